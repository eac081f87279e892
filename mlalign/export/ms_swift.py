"""For ms-swift: ``OUT/train.jsonl`` with ``messages`` and ``rejected_response``, images beside.

``swift rlhf --dataset OUT/train.jsonl`` reads it. Image paths are absolute unless ``paths`` says
otherwise: ms-swift takes relative ones from the folder that it is called in.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mlalign.export._files import Tag, image_file, write_rows
from mlalign.records import ImageRef, Preference


class Settings(BaseModel):
    """How images are named, and how a prompt begins."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    paths: Literal["absolute", "relative"] = "absolute"
    """relative: to OUT, for a folder that will be moved; then call ms-swift from there."""
    tag: Tag = "<image>"
    """What stands before the question."""


class MsSwift:
    """The exporter."""

    Settings = Settings
    lacks = frozenset({"segments", "claims", "scores"})

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def write(self, pairs: Iterable[Preference], folder: Path, final: Path) -> None:
        """Rows and images."""

        def named(image: ImageRef) -> str:
            name = image_file(image, folder)
            return name if self.settings.paths == "relative" else str(final / name)

        def row(pair: Preference) -> dict[str, Any]:
            made: dict[str, Any] = {
                "id": pair.id,
                "messages": [
                    {"role": "user", "content": self.settings.tag + pair.prompt},
                    {"role": "assistant", "content": pair.chosen},
                ],
                "rejected_response": pair.rejected,
                "images": [named(pair.image)],
            }
            if pair.rejected_image is not None:
                made["rejected_images"] = [named(pair.rejected_image)]
            return made

        write_rows(folder / "train.jsonl", map(row, pairs))


METHOD = MsSwift
