"""For TRL: ``OUT/data/train-*.parquet``, which ``datasets.load_dataset(OUT)`` reads as it is.

Columns ``images`` (bytes inside), ``prompt``, ``chosen`` and ``rejected`` (conversational), as
``DPOTrainer`` takes them for a vision model, and ``id``, which it ignores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mlalign.records import Preference

_CHUNK = 64
"""Rows held at once."""


class Settings(BaseModel):
    """There is nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Trl:
    """The exporter."""

    Settings = Settings
    lacks = frozenset({"segments", "claims", "scores", "rejected_image"})

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def write(self, pairs: Iterable[Preference], folder: Path, final: Path) -> None:
        """One Parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _features().arrow_schema
        (folder / "data").mkdir()
        file = folder / "data" / "train-00000-of-00001.parquet"
        rows: Iterator[dict[str, Any]] = map(_row, pairs)
        with pq.ParquetWriter(file, schema) as writer:
            while chunk := list(islice(rows, _CHUNK)):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


def _features() -> Any:
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    message = List({"role": Value("string"), "content": Value("string")})
    columns: dict[str, Any] = {"id": Value("string"), "images": List(ImageFeature())}
    return Features(columns | dict.fromkeys(("prompt", "chosen", "rejected"), message))


def _row(pair: Preference) -> dict[str, Any]:
    name = Path(pair.image.path).name if pair.image.path else None
    return {
        "id": pair.id,
        "images": [{"bytes": pair.image.read(), "path": name}],
        "prompt": [{"role": "user", "content": pair.prompt}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


METHOD = Trl
