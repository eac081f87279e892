"""GRPO with credit by token: groups of sampled answers, rewarded, through TRL's GRPOTrainer.

Shao et al., 2402.03300. ``credit.form: sequence`` is plain GRPO; ``spans`` adds the credit of
claims or sentences, each completion's summing to zero; ``process`` is DeepSeekMath's process
supervision (``mlalign.credit.group``). The loss is TRL's, by ``loss_type``. Prompts, images and
facts are examples of ``data.source`` (``data.prompts``); ``train.batch_size`` counts prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from trl import GRPOConfig

from mlalign.credit.group import Settings as CreditSettings
from mlalign.recipe import Recipe
from mlalign.train._rewarding import RewardSettings
from mlalign.train._rollout_run import run_groups
from mlalign.train.group_trainer import GroupTrainer
from mlalign.train.rollouts import Sampling
from mlalign.train.watching import WatchSettings


class Settings(Sampling, RewardSettings, WatchSettings):
    """Sampling, rewards, credit, loss."""

    credit: CreditSettings = CreditSettings()
    beta: float = Field(default=0.04, ge=0)
    """Weight of the KL to the reference (adapter off) in the loss; 0: no reference pass."""
    epsilon: float = Field(default=0.2, gt=0)
    """Clip of the ratio, below."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Clip above; None: as below."""
    iterations: int = Field(default=1, ge=1)
    """Optimiser steps on each rollout."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"


class Grpo:
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
            trainer=GroupTrainer,
            config=GRPOConfig,
            keys={
                "epsilon": own.epsilon,
                "epsilon_high": own.epsilon_high,
                "num_iterations": own.iterations,
                "loss_type": own.loss_type,
            },
        )


METHOD = Grpo
