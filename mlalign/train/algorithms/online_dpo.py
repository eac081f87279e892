"""Online DPO: the policy's best answer of a group against its worst, by ``train.objective``.

Guo et al., 2402.04792: see ``mlalign.train.online_trainer``. The rewards judge;
``train.batch_size`` counts prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import GRPOConfig

from mlalign.credit.group import Settings as CreditSettings
from mlalign.recipe import Recipe
from mlalign.train._rewarding import RewardSettings
from mlalign.train._rollout_run import run_groups
from mlalign.train.online_trainer import OnlineTrainer
from mlalign.train.preference import objective_of
from mlalign.train.rollouts import Sampling
from mlalign.train.watching import WatchSettings


class Settings(Sampling, RewardSettings, WatchSettings):
    """Sampling and rewards; beta is the objective's."""

    @property
    def iterations(self) -> int:
        """A rollout is of its moment: it is trained on once."""
        return 1

    @property
    def credit(self) -> CreditSettings:
        """None by token."""
        return CreditSettings(form="sequence")

    @property
    def beta(self) -> float:
        """None beside the objective's."""
        return 0.0


class OnlineDpo:
    """The algorithm."""

    Settings = Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def train(self, recipe: Recipe, arm: str, run: Path) -> Any:
        """Train the arm; see ``_rollout_run.run_groups``."""

        def made(**keys: Any) -> OnlineTrainer:
            return OnlineTrainer(objective=objective_of(recipe), **keys)

        return run_groups(recipe, arm, run, self.settings, trainer=made, config=GRPOConfig, keys={})


METHOD = OnlineDpo
