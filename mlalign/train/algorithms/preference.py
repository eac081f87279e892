"""DPO and its kin: pairs and ``train.objective``; see ``mlalign.train.preference``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mlalign.recipe import Recipe


class Settings(BaseModel):
    """None: what is trained on pairs is the objective's to say."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PreferenceTraining:
    """The algorithm."""

    Settings = Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def train(self, recipe: Recipe, arm: str, run: Path) -> Any:
        """Train the arm; see ``preference.train_arm``."""
        from mlalign.train.preference import train_arm

        return train_arm(recipe, arm, run)


METHOD = PreferenceTraining
