"""Records at rest: Parquet with TRL's columns and ours beside them; atomic writes. No torch.

A preference file can be taken as it is by TRL (``images``, ``prompt``, ``chosen``, ``rejected``,
conversational); what TRL does not know stands in further columns, which it ignores. Every file is
written aside and renamed, so that an interrupt or a full disk leaves the old one whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlalign import _rows
from mlalign.records import Example, ImageRef, Preference, Skip, example_from_json

StoreError = _rows.StoreError

CHUNK = 256
CHUNK_BYTES = 32 << 20
"""Rows, and bytes of their images, from which on what was gathered is written: what is held in
memory at once."""


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".tmp")
    try:
        with aside.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


@contextlib.contextmanager
def folder_atomic(folder: str | Path) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its place when the block ends without an error."""
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_preferences(
    folder: str | Path, preferences: Iterable[Preference], manifest: dict[str, Any]
) -> dict[str, Any]:
    """Stream pairs into ``folder/pairs.parquet`` with ``folder/manifest.json`` beside it.

    ``manifest`` is read after the last pair, so that a generator may fill it as it goes; ``pairs``
    and ``sha256`` are added. Returns it.
    """
    return _write(
        folder, "pairs", preferences, _rows.preference_features(), _rows.preference_row, manifest
    )


def write_examples(
    folder: str | Path, examples: Iterable[Example], manifest: dict[str, Any]
) -> dict[str, Any]:
    """Stream examples into ``folder/examples.parquet`` with a manifest beside it."""
    return _write(
        folder, "examples", examples, _rows.example_features(), _rows.example_row, manifest
    )


def read_examples(path: str | Path) -> list[Example]:
    """Examples that ``write_examples`` wrote."""
    return [
        example_from_json(
            json.loads(row["record"]),
            ImageRef(path=row["image"]["path"], data=row["image"]["bytes"]),
        )
        for _, row in _rows.raw_rows(Path(path), "examples")
    ]


def read_preferences(path: str | Path) -> Iterator[Preference | Skip]:
    """Pairs of a file or folder, ours or any with TRL's columns (Parquet, JSON lines, JSON).

    A faulty row comes out as a Skip whose reason names the key and whose detail is the whole
    message; nothing is dropped here. Raises StoreError where the file itself cannot be read.
    """
    for where, row in _rows.raw_rows(Path(path), "pairs"):
        yield _rows.preference_of(where, row)


def fingerprint(path: str | Path) -> str:
    """SHA-256 over a file, or over the records file of a folder."""
    digest = hashlib.sha256()
    for file in _rows.record_files(Path(path)):
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _write(
    folder: str | Path,
    name: str,
    records: Iterable[Any],
    features: Any,
    to_row: Any,
    manifest: dict[str, Any],
) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = features.arrow_schema
    count = 0
    with folder_atomic(folder) as aside:
        file = aside / f"{name}.parquet"
        with pq.ParquetWriter(file, schema) as writer:
            for rows in _batches(map(to_row, records)):
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                count += len(rows)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        manifest[name] = count
        manifest["sha256"] = fingerprint(file)
        write_json_atomic(aside / "manifest.json", manifest)
    return manifest


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows in lists that end with CHUNK rows or CHUNK_BYTES of images."""
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _rows.image_bytes(row)
        if len(batch) >= CHUNK or size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
