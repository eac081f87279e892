"""What readers of released preference sets share: their files, rows and fields; faults as skips."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from data_builders.sources._common import faulty
from mlalign.records import Preference, Rated, RecordError, Skip
from mlalign.store import fingerprint

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Made = TypeVar("Made", Preference, Rated)
"""What rows are made into."""
_BATCH = 32
"""Parquet rows held at once: a row may hold an image of a few megabytes."""


class SourceError(ValueError):
    """A release that cannot be read at all. The message names the setting, the file, the mend."""


class Released(BaseModel):
    """Where a release lies; each source adds what its own needs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str
    """Data set id on the Hub, a file, or a folder that holds the release's files."""
    revision: str | None = None
    """Revision on the Hub; pin it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a file as it stands there."""

    file: Path
    number: int
    """From 1."""
    value: Any
    fault: str = ""
    """Why there is no value."""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


class PairSource:
    """A released preference set, one row after another. A subclass turns one row into pairs."""

    Settings: ClassVar[Any] = Released
    name: ClassVar[str]
    language = "english"
    patterns: ClassVar[tuple[str, ...]]
    """File names of the release, the preferred form first."""
    expected: ClassVar[frozenset[str]] = frozenset()
    """Reasons for a skip that the release or a setting brings: counted, but no fault of a row."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self._files: list[Path] | None = None

    def files(self) -> list[Path]:
        """The release's files, fetched from the Hub where the path is an id. Raises SourceError."""
        if self._files is None:
            settings = self.settings
            self._files = locate(settings.path, self.patterns, settings.revision)
        return self._files

    def fingerprint(self) -> dict[str, Any]:
        """What was read: the settings, and each file's hash."""
        root = os.path.commonpath([file.parent for file in self.files()])
        return {
            "source": self.name,
            **self.settings.model_dump(mode="json"),
            "files_sha256": {
                str(file.relative_to(root)): fingerprint(file) for file in self.files()
            },
        }

    def pairs(self, limit: int | None, seed: int) -> Iterator[Preference | Skip]:
        """Pairs and skips of the first ``limit`` rows in the release's own order; streams."""
        rows = chain.from_iterable(map(rows_of, self.files()))
        return read(self.name, rows, self.key, self.made, limit, count_rows(self.files()))

    def key(self, row: dict[str, Any]) -> Any:
        """What the release calls the row; None where it has no name for it."""
        raise NotImplementedError

    def made(self, row: dict[str, Any], record_id: str) -> Iterator[Preference | Skip]:
        """Pairs and skips of one row. A RecordError ends it and becomes a Skip."""
        raise NotImplementedError

    def origin(self, **facts: Any) -> dict[str, Any]:
        """Where a pair comes from, without what the row does not say."""
        return {"source": self.name, **{k: v for k, v in facts.items() if v is not None}}


def locate(path: str, patterns: Sequence[str], revision: str | None = None) -> list[Path]:
    """Files of a release: the path itself, or what the first fitting pattern finds in the folder.

    A path that is not on this machine is taken for a data set id and fetched from the Hub, of which
    only files that fit a pattern are taken. Raises SourceError.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir():
        root = _fetch(path, patterns, revision)
    for pattern in patterns:
        found = [p for p in root.rglob(pattern) if p.is_file() and not _hidden(p, root)]
        if found:
            return sorted(found)
    raise SourceError(
        f"path: {root} holds none of {', '.join(patterns)}. Give the release's file, or the folder "
        "that holds it"
    )


def folder_of(files: Sequence[Path]) -> Path:
    """The folder where relative image paths start. Raises SourceError for files in several."""
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:
        raise SourceError(
            f"images: the files lie in {len(folders)} folders ({folders[0]}, {folders[1]}...). "
            "Say in which of them image paths start, or give one folder as path"
        )
    return folders[0]


def rows_of(file: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of a Parquet, JSON lines or JSON list file; a line that is not JSON is a faulty row.

    A row group of a Parquet file is held at a time, a line of JSON lines, a JSON list whole.
    ``columns``: read only these (Parquet; elsewhere rows come whole). Raises SourceError.
    """
    if file.suffix == ".parquet":
        yield from _parquet_rows(file, columns)
    elif file.suffix == ".jsonl":
        yield from _json_lines(file)
    else:
        value = load_json(file)
        if not isinstance(value, list):
            kind = type(value).__name__
            raise SourceError(f"{file}: holds one {kind}, not a list of rows. Give another file")
        for number, row in enumerate(value, start=1):
            yield Row(file=file, number=number, value=row)


def count_rows(files: Sequence[Path]) -> int | None:
    """Rows of Parquet files, for a progress bar; None where counting would mean reading."""
    if any(file.suffix != ".parquet" for file in files):
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return sum(pq.ParquetFile(file).metadata.num_rows for file in files)
    except (OSError, pa.ArrowInvalid):
        return None


def load_json(file: Path) -> Any:
    """A JSON file. Raises SourceError naming it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror}). Check the path") from error
    except ValueError as error:
        raise SourceError(f"{file}: is not JSON in UTF-8 ({error}). Fetch it again") from error


def read(
    name: str,
    rows: Iterable[Row],
    key: Callable[[dict[str, Any]], Any],
    make: Callable[[dict[str, Any], str], Iterable[Made | Skip]],
    limit: int | None,
    total: int | None = None,
) -> Iterator[Made | Skip]:
    """What ``make`` makes of each of the first ``limit`` rows, with a progress bar.

    A record's id is ``{name}-{key}``, by the row's number where it has no key, and ``.2`` and so on
    where an earlier row has the same key: releases do repeat them. A RecordError is a Skip whose
    detail names the file and the row.
    """
    seen: Counter[str] = Counter()
    total = limit if total is None else total if limit is None else min(total, limit)
    shown = {"desc": name, "unit": "row", "disable": not sys.stderr.isatty(), "leave": False}
    with closing(tqdm(islice(rows, limit), total=total, **shown)) as bar:
        for row in bar:
            record_id = f"{name}-row{row.number}"
            try:
                if row.fault or not isinstance(row.value, dict):
                    problem = row.fault or f"is {type(row.value).__name__}, not a mapping of keys"
                    raise RecordError(record_id, "row", problem, "Mend or remove the row")
                own = key(row.value)
                named = isinstance(own, (str, int)) and not isinstance(own, bool)
                if named and str(own).strip():
                    record_id = f"{name}-{own}"
                seen[record_id] += 1
                if seen[record_id] > 1:
                    record_id += f".{seen[record_id]}"
                for made in make(row.value, record_id):
                    yield _placed(made, row) if isinstance(made, Skip) else made
            except RecordError as error:
                yield _placed(faulty(error), row)


def _fetch(path: str, patterns: Sequence[str], revision: str | None) -> Path:
    if not _HUB_ID.fullmatch(path):
        raise SourceError(
            f"path: {path} is neither a file nor a folder here, nor a data set id (owner/name)"
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                path, repo_type="dataset", revision=revision, allow_patterns=list(patterns)
            )
        )
    except (OSError, ValueError) as error:
        raise SourceError(
            f"path: {path} is not on this machine and could not be fetched from the Hub ({error}). "
            "Fetch the release by hand and give its folder"
        ) from error


def _placed(skip: Skip, row: Row) -> Skip:
    return dataclasses.replace(skip, detail=f"{row.where}: {skip.detail or skip.reason}")


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _parquet_rows(file: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        table = pq.ParquetFile(file)
        known = None if columns is None else [c for c in columns if c in table.schema_arrow.names]
        for group in range(table.num_row_groups):
            # One group at a time: over all of them, pyarrow keeps every group that it has read.
            for batch in table.iter_batches(_BATCH, row_groups=[group], columns=known):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(file=file, number=number, value=value)
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(
            f"{file}: damaged or not Parquet after row {number} ({error}). Fetch it again"
        ) from error


def _json_lines(file: Path) -> Iterator[Row]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield Row(file=file, number=number, value=json.loads(line))
                except (ValueError, RecursionError):
                    yield Row(file=file, number=number, value=None, fault="is not JSON")
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror}). Check the path") from error
