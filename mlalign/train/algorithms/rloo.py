"""RLOO: each answer against the mean of the others of its group, through TRL's RLOOTrainer.

Ahmadian et al., 2402.14740. One ratio and one advantage per answer, the KL taken off its reward,
so rewards of spans count in their sum only: no credit by token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field
from trl import RLOOConfig

from mlalign.credit.group import Settings as CreditSettings
from mlalign.recipe import Recipe
from mlalign.train._rewarding import RewardSettings
from mlalign.train._rollout_run import run_groups
from mlalign.train.group_trainer import LeaveOneOutTrainer
from mlalign.train.rollouts import Sampling
from mlalign.train.watching import WatchSettings


class Settings(Sampling, RewardSettings, WatchSettings):
    """Sampling, rewards, loss."""

    beta: float = Field(default=0.05, ge=0)
    """Reward lost per nat of KL to the reference (adapter off)."""
    epsilon: float = Field(default=0.2, gt=0)
    """Clip of the answer's ratio."""
    iterations: int = Field(default=1, ge=1)
    """Optimiser steps on each rollout."""
    normalise: bool = False
    """Advantages of the batch to mean 0 and deviation 1."""

    @property
    def credit(self) -> CreditSettings:
        """Of whole answers, against the others."""
        scale = "batch" if self.normalise else "none"
        return CreditSettings(form="sequence", baseline="leave_one_out", scale=scale)


class Rloo:
    """The algorithm."""

    Settings = Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def train(self, recipe: Recipe, arm: str, run: Path) -> Any:
        """Train the arm; see ``_rollout_run.run_groups``."""
        own = self.settings
        return run_groups(
            recipe,
            arm,
            run,
            own,
            trainer=LeaveOneOutTrainer,
            config=RLOOConfig,
            keys={"epsilon": own.epsilon, "num_iterations": own.iterations},
        )


METHOD = Rloo
