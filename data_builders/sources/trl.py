"""A preference file as TRL takes it: ``images`` or ``image``, ``prompt``, ``chosen``, ``rejected``.

Texts are plain or conversational (a list with one ``{role, content}``; content is text, or parts
of type text and image). Parquet, JSON lines or JSON; image paths are looked up beside the file.
Our own pair files are such files, and keep what they say beyond TRL's columns. A record keeps the
``id`` that its row has; a row without one is named by its number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_builders.sources._common import faulty
from data_builders.sources._fields import checked
from data_builders.sources._released import PairSource, Released, count_rows, locate
from mlalign.records import Preference, RecordError, Skip
from mlalign.store import read_preferences


class Settings(Released):
    """Where the files lie."""

    files: str | None = None
    """Pattern of the files to read in a folder or data set; None: those of the training split
    (``train-*.parquet``) where files are named so, else all."""


class Trl(PairSource):
    """The source."""

    Settings = Settings
    name = "trl"
    patterns = ("train-*.parquet", "*.parquet", "*.jsonl", "*.json")

    def files(self) -> list[Path]:
        """The files of the split that is read. Raises SourceError."""
        if self._files is None and self.settings.files is not None:
            settings = self.settings
            self._files = locate(settings.path, (settings.files,), settings.revision)
        return super().files()

    def pairs(self, limit: int | None, seed: int) -> Iterator[Preference | Skip]:
        """Pairs and skips of the first ``limit`` rows, in order; streams."""
        rows = chain.from_iterable(map(self._rows, self.files()))
        total = limit if limit is not None else count_rows(self.files())
        yield from tqdm(
            islice(rows, limit), desc=self.name, unit="row", total=total, disable=None, leave=False
        )

    def _rows(self, file: Path) -> Iterator[Preference | Skip]:
        for found in read_preferences(file):
            record_id = self._named(found.id, file)
            if isinstance(found, Skip):
                yield dataclasses.replace(found, id=record_id)
                continue
            try:
                image, digest = checked(found.image, record_id)
                if found.rejected_image is not None:
                    checked(found.rejected_image, record_id)
            except RecordError as error:
                yield faulty(error)
                continue
            origin: dict[str, Any] = found.origin or self.origin(row=record_id, file=file.name)
            yield dataclasses.replace(
                found, id=record_id, image=image, image_sha256=digest, origin=origin
            )

    def _named(self, given: str, file: Path) -> str:
        """The row's own id, or its number: what the reader calls it otherwise holds the path."""
        path, _, number = given.rpartition(":")
        return f"{self.name}-{file.stem}-row{number}" if path == str(file) else given


METHOD = Trl
