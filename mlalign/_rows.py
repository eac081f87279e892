"""Rows of a record file, and the records that they hold: TRL's columns with ours beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlalign.records import (
    IMAGE_TOKEN,
    Example,
    ImageRef,
    Preference,
    RecordError,
    Skip,
    preference_from_json,
    to_json,
)

OURS = "record"
"""Column with the whole record as JSON, but for what TRL's columns already hold."""


class StoreError(ValueError):
    """A record file that cannot be read. The message names it and the mend."""


def preference_features() -> Any:
    """``datasets`` features of a preference file."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    message = List({"role": Value("string"), "content": Value("string")})
    return Features(
        {
            "id": Value("string"),
            "images": List(ImageFeature()),
            "prompt": message,
            "chosen": message,
            "rejected": message,
            "rejected_images": List(ImageFeature()),
            OURS: Value("string"),
        }
    )


def example_features() -> Any:
    """``datasets`` features of an example file."""
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    return Features({"id": Value("string"), "image": ImageFeature(), OURS: Value("string")})


def preference_row(pair: Preference) -> dict[str, Any]:
    """A pair as a row of the Parquet file, its images as bytes."""
    other = pair.rejected_image
    record = to_json(pair)
    for key in ("prompt", "chosen", "rejected"):
        del record[key]
    return {
        "id": pair.id,
        "images": [_cell(pair.image)],
        "prompt": [{"role": "user", "content": pair.prompt}],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "rejected_images": [] if other is None else [_cell(other)],
        OURS: json.dumps(record, ensure_ascii=False),
    }


def example_row(example: Example) -> dict[str, Any]:
    """An example as a row of the Parquet file, its image as bytes."""
    return {
        "id": example.id,
        "image": _cell(example.image),
        OURS: json.dumps(to_json(example), ensure_ascii=False),
    }


def image_bytes(row: dict[str, Any]) -> int:
    """Bytes of the encoded images of a row."""
    cells = [*row.get("images", ()), *row.get("rejected_images", ())]
    cells += [row["image"]] if "image" in row else []
    return sum(len(cell["bytes"]) for cell in cells)


def record_files(path: Path) -> list[Path]:
    """The record files of a path, sorted. Raises StoreError where there is none."""
    if path.is_file():
        return [path]
    files = sorted(p for p in path.glob("*") if p.suffix in (".parquet", ".jsonl"))
    if not files:
        raise StoreError(
            f"{path}: no .parquet or .jsonl file there; give a file, or a folder of them"
        )
    return files


def raw_rows(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """(where, row) for every row; ``where`` names file and row, counted from 1. A line of JSON
    lines that is none comes out as a text that says so."""
    for file in record_files(path):
        try:
            yield from _rows_of(file)
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise StoreError(
                f"{file}: cannot be read as {kind} ({error}). Build it again"
            ) from error


def preference_of(where: str, row: dict[str, Any]) -> Preference | Skip:
    """The pair of a row, or a Skip that says what is wrong with it."""
    if not isinstance(row, dict):
        what = row if isinstance(row, str) else f"{type(row).__name__}, not a mapping"
        detail = f"{where}: is {what[:200]}. A row is a mapping with TRL's columns"
        return Skip(id=where, reason="row is not a mapping", detail=detail)
    record_id = str(row.get("id") or where)
    try:
        return _preference(record_id, where, row)
    except RecordError as error:
        return Skip(id=record_id, reason=error.reason, detail=f"{where}: {error}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        mend = f"Leave the column out, or give what `mlalign build` writes there ({error})"
        fault = RecordError(record_id, OURS, "damaged", mend)
        return Skip(id=record_id, reason=fault.reason, detail=f"{where}: {fault}")


def _preference(record_id: str, where: str, row: dict[str, Any]) -> Preference:
    ours = json.loads(row[OURS]) if row.get(OURS) else {}
    images = row.get("images")
    if images is None:
        images = [row["image"]] if row.get("image") is not None else []
    if len(images) != 1:
        raise RecordError(
            record_id,
            "images",
            f"{len(images)} images, but a record has exactly one",
            "Remove the record, or split it into one record per image",
        )
    folder = Path(where.rpartition(":")[0]).parent
    image = _image(record_id, images[0], folder)
    others = row.get("rejected_images") or []
    value = {
        **ours,
        "id": record_id,
        "prompt": _text(record_id, "prompt", row.get("prompt"), "user"),
        "chosen": _text(record_id, "chosen", row.get("chosen"), "assistant"),
        "rejected": _text(record_id, "rejected", row.get("rejected"), "assistant"),
        "rejected_image": None,
    }
    pair = preference_from_json(value, image)
    if not others:
        return pair
    import dataclasses

    return dataclasses.replace(pair, rejected_image=_image(record_id, others[0], folder))


def _text(record_id: str, key: str, value: Any, role: str) -> str:
    """The text of a plain string or of a list of messages with one turn."""
    if isinstance(value, str):
        return value.replace(IMAGE_TOKEN, "").strip() if key == "prompt" else value
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
        shown = (
            "missing"
            if value is None
            else f"{len(value)} messages"
            if isinstance(value, list)
            else repr(value)
        )
        raise RecordError(
            record_id,
            key,
            f"{shown}, but one {role} message is needed",
            "Give one message or a text",
        )
    content = value[0].get("content")
    if isinstance(content, list):
        content = " ".join(
            part["text"] for part in content if part.get("type") == "text" and part.get("text")
        )
    if not isinstance(content, str):
        raise RecordError(record_id, key, "the message has no text", "Give content as text")
    return content.replace(IMAGE_TOKEN, "").strip() if key == "prompt" else content


def _image(record_id: str, value: Any, folder: Path) -> ImageRef:
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, dict) or not (value.get("path") or value.get("bytes")):
        raise RecordError(record_id, "images", "neither a path nor bytes", "Give one of them")
    if value.get("bytes"):
        return ImageRef(path=value.get("path"), data=value["bytes"])
    path = Path(value["path"])
    return ImageRef(path=str(path if path.is_absolute() else folder / path))


def _cell(image: ImageRef) -> dict[str, Any]:
    return {"bytes": image.read(), "path": Path(image.path).name if image.path else None}


def _rows_of(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(file)
            number = 0
            for group in range(table.num_row_groups):
                # Over a whole file the reader keeps every row group that it has read.
                for batch in table.iter_batches(batch_size=64, row_groups=[group]):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{file}:{number}", row
        except pa.ArrowInvalid as error:
            raise StoreError(f"{file}: damaged or not Parquet ({error}). Build it again") from error
        return
    with file.open(encoding="utf-8") as handle:
        if file.suffix == ".json":
            for number, row in enumerate(json.load(handle), start=1):
                yield f"{file}:{number}", row
            return
        for number, line in enumerate(handle, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    # The other lines can be read: what this one is counted as is the reader's.
                    row = f"line that is not JSON ({error})"
                yield f"{file}:{number}", row
