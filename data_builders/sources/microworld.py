"""The built-in world's scenes, with every object, box, colour and place known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data_builders.sources._common import check_split
from mlalign.microworld import world
from mlalign.records import Example, Skip

_WORLD_SPLIT = {"train": "pairs", "heldout": "heldout", "probe": "probe"}
"""The world's own "train" scenes are what the base model was trained on; pairs never use them."""


class Settings(BaseModel):
    """How many scenes there are. They are drawn when asked for, so this only ends the iteration."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    train: int = Field(default=2000, ge=1)
    """Scenes of split "train", which pairs are built from."""
    heldout: int = Field(default=1000, ge=1)
    """Scenes of split "heldout"."""
    probe: int = Field(default=256, ge=1)
    """Scenes of split "probe"."""


class Microworld:
    """The source."""

    Settings = Settings
    language = "microworld"
    vocabulary = "microworld"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def examples(
        self, split: str, limit: int | None, seed: int, start: int = 0
    ) -> Iterator[Example | Skip]:
        """Scenes in order; another seed draws other scenes."""
        check_split(split, "microworld")
        count = getattr(self.settings, split)
        for index in range(start, count if limit is None else min(limit, count)):
            yield world.example(_WORLD_SPLIT[split], index, seed)

    def fingerprint(self) -> dict[str, Any]:
        """What was read."""
        return {"source": "microworld", **self.settings.model_dump()}


METHOD = Microworld
