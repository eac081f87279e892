"""For LLaMA-Factory: sharegpt rows with ``ranking``, registered, images as files beside.

    OUT/dataset_info.json    one entry, named by ``dataset``
    OUT/<dataset>.jsonl      conversations, chosen, rejected, images (paths below OUT), id
    OUT/images/

``dataset_dir: OUT`` and ``dataset: <dataset>`` in its YAML are enough: it looks for image paths
below the folder of dataset_info.json (its media_dir) unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mlalign.export._files import Tag, image_file, write_rows
from mlalign.records import Preference
from mlalign.store import write_json_atomic


class Settings(BaseModel):
    """The entry's name, and how a prompt begins."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    dataset: str = Field(default="mlalign", pattern=r"^\w[\w-]*$")
    """Name of the entry and of the file."""
    tag: Tag = "<image>"
    """What stands before the question; LLaMA-Factory wants one tag for each image."""


class LlamaFactory:
    """The exporter."""

    Settings = Settings
    lacks = frozenset({"segments", "claims", "scores", "rejected_image"})

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def write(self, pairs: Iterable[Preference], folder: Path, final: Path) -> None:
        """Rows, images and the entry."""
        file = f"{self.settings.dataset}.jsonl"
        rows = (
            {
                "id": pair.id,
                "conversations": [{"from": "human", "value": self.settings.tag + pair.prompt}],
                "chosen": {"from": "gpt", "value": pair.chosen},
                "rejected": {"from": "gpt", "value": pair.rejected},
                "images": [image_file(pair.image, folder)],
            }
            for pair in pairs
        )
        write_rows(folder / file, rows)
        columns = {key: key for key in ("chosen", "rejected", "images")}
        entry = {
            "file_name": file,
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", **columns},
        }
        write_json_atomic(folder / "dataset_info.json", {self.settings.dataset: entry})


METHOD = LlamaFactory
