"""RLAIF-V's pairs by an open labeler (Yu et al., 2405.17220): openbmb/RLAIF-V-Dataset, 83,132.

Parquet rows ``ds_name, image{bytes, path}, question, chosen, rejected, origin_dataset,
origin_split, idx, image_path``; ``origin_split`` is a JSON string that names the model that
answered, the labeler and the kind of question. The release mixes every iteration and three models:
one iteration is the shards that it was written to (``RLAIF-V-Dataset_007.parquet`` is shard 7).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_builders.sources._fields import image_of, question_of, text_of, told
from data_builders.sources._released import PairSource, Released, SourceError, locate
from mlalign.records import Preference, Skip

_NUMBER = re.compile(r"(\d+)(?:-of-\d+)?$")


class Settings(Released):
    """Where the release lies, and which of its shards are read."""

    images: str | None = None
    """Folder where ``image_path`` is looked up in a row without image bytes."""
    shards: tuple[int, ...] = ()
    """Numbers of the Parquet files to read, in this order; none: all. From the Hub, only these are
    fetched."""


class RlaifV(PairSource):
    """The source."""

    Settings = Settings
    name = "rlaif_v"
    patterns = ("*.parquet", "*.jsonl", "*.json")

    def files(self) -> list[Path]:
        """The chosen shards. Raises SourceError naming those that are there."""
        if self._files is None:
            path, shards = self.settings.path, self.settings.shards
            revision = self.settings.revision
            if shards and not Path(path).expanduser().exists():
                fetched = [locate(path, (f"*{n:03d}*.parquet",), revision) for n in shards]
                found = [file for files in fetched for file in files]
            else:
                found = locate(path, self.patterns, revision)
            self._files = _chosen(found, shards) if shards else found
        return self._files

    def key(self, row: dict[str, Any]) -> Any:
        return row.get("idx")

    def made(self, row: dict[str, Any], record_id: str) -> Iterator[Preference | Skip]:
        """One pair."""
        prompt = question_of(text_of(row, "question", record_id), "question", record_id)
        chosen, rejected = (text_of(row, side, record_id) for side in ("chosen", "rejected"))
        given = row.get("image") if row.get("image") is not None else row.get("image_path")
        image, digest = image_of(given, record_id, self.settings.images)
        yield Preference(
            id=record_id,
            image=image,
            image_sha256=digest,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            origin=self.origin(
                row=row.get("idx"),
                dataset=row.get("origin_dataset"),
                split=told(row.get("origin_split")),
                image_path=row.get("image_path"),
            ),
        )


def _chosen(files: list[Path], shards: tuple[int, ...]) -> list[Path]:
    numbered = {int(m[1]): file for file in files if (m := _NUMBER.search(file.stem))}
    missing = [shard for shard in shards if shard not in numbered]
    if missing:
        raise SourceError(
            f"shards: no file of shard {', '.join(map(str, missing))} in {files[0].parent}. "
            f"There are: {', '.join(map(str, sorted(numbered))) or 'no numbered files'}"
        )
    return [numbered[shard] for shard in shards]


METHOD = RlaifV
