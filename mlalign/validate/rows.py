"""One row of a pairs file: all of its faults, not only the first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlalign._rows import OURS, StoreError, preference_of, raw_rows, record_files
from mlalign.records import IMAGE_TOKEN, Preference
from mlalign.validate.findings import Finding, fault, note

IMAGE_KINDS = (
    ("cannot read", "image cannot be read"),
    ("is not an image", "image file is not an image"),
    ("more than", "image has too many pixels"),
    ("truncated", "image is truncated or damaged"),
)
"""Words of an image's fault, and the kind that it is counted under."""
ONE_LINE = '{"images": [path], "prompt": text, "chosen": text, "rejected": text}'


def rows_of(path: Path) -> Iterator[tuple[str, int, Any]]:
    """(file, row from 1, value) of every row; a Finding in the value's place where it cannot be
    read. Raises StoreError where there is no record file."""
    for file in record_files(path):
        if file.suffix == ".jsonl":
            yield from _lines(file)
            continue
        number = 0
        try:
            for where, row in raw_rows(file, "pairs"):
                number = int(where.rpartition(":")[2])
                yield str(file), number, row
        except StoreError as error:
            found = fault(str(file), "file", f"cannot be read after row {number} ({error})")
            yield str(file), number + 1, found


def count_rows(path: Path) -> int | None:
    """Rows of a file or folder, for a progress bar; None where counting would mean reading."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = 0
    try:
        for file in record_files(path):
            if file.suffix == ".parquet":
                total += pq.ParquetFile(file).metadata.num_rows
            elif file.suffix == ".jsonl":
                with file.open("rb") as handle:
                    total += sum(1 for _ in handle)
            else:
                return None
    except (OSError, StoreError, pa.ArrowInvalid):
        return None
    return total


def pair_of(file: str, number: int, row: Any) -> tuple[Preference | None, list[Finding], bool]:
    """(pair, faults, whether its image can be looked at) of a row.

    A faulty key gets a stand-in and the row is read again, until nothing more is found: the pair
    that comes out is whole only where there is no fault. None where no stand-in helps.
    """
    if isinstance(row, Finding):
        return None, [row], False
    if not isinstance(row, dict):
        problem = f"is {type(row).__name__}, not a mapping of keys"
        kind = "row: not a mapping of keys"
        found = fault(file, "row", problem, f"Write {ONE_LINE}", row=number, kind=kind)
        return None, [found], False
    own = row.get("id")
    record = str(own) if own else None
    findings = _marks(file, number, record, row.get("prompt"))
    mended: set[str] = set()
    while True:
        made = preference_of(f"{file}:{number}", row)
        if isinstance(made, Preference):
            return made, findings, "images" not in mended
        key = made.reason.partition(": ")[0]
        findings.append(row_fault(file, number, record, made.reason, made.detail))
        if key in mended or key not in _STAND_INS:
            return None, findings, False
        mended.add(key)
        row = _STAND_INS[key](row)


def row_fault(file: str, number: int, record: str | None, reason: str, detail: str) -> Finding:
    """A Skip of the reader as a fault: reason "key: problem", detail "... problem. mend"."""
    key, _, problem = reason.partition(": ")
    mend = detail.partition(f"{reason}. ")[2]
    kind = reason
    if key == "image":
        kind = next((kind for words, kind in IMAGE_KINDS if words in problem), reason)
    elif key == "segments":
        kind = "segments: span outside of the text"
    return fault(file, key, problem, mend, row=number, record=record, kind=kind)


def _lines(file: Path) -> Iterator[tuple[str, int, Any]]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                yield str(file), number, json.loads(line)
            except (ValueError, RecursionError) as error:
                problem = f"is not JSON in UTF-8 ({error})"
                mend = "Mend or remove the line"
                kind = "line: is not JSON in UTF-8"
                found = fault(str(file), "line", problem, mend, row=number, kind=kind)
                yield str(file), number, found


def _marks(file: str, number: int, record: str | None, prompt: Any) -> list[Finding]:
    """Places of the image in a prompt: one record has one image, and the template says where."""
    texts, parts = [prompt] if isinstance(prompt, str) else [], 0
    if isinstance(prompt, list):
        for message in prompt:
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, str):
                texts.append(content)
            elif isinstance(content, list):
                dicts = [part for part in content if isinstance(part, dict)]
                texts += [part["text"] for part in dicts if isinstance(part.get("text"), str)]
                parts += sum(part.get("type") == "image" for part in dicts)
    tags = parts + sum(text.count(IMAGE_TOKEN) for text in texts)
    more: dict[str, Any] = {"row": number, "record": record}
    if tags > 1:
        problem = f"places {tags} images, but a record has exactly one"
        mend = "Remove the record, or split it into one record per image"
        kind = "prompt: places several images"
        return [fault(file, "prompt", problem, mend, kind=kind, **more)]
    inside = [
        text
        for text in (text.strip() for text in texts)
        if IMAGE_TOKEN in text and not text.startswith(IMAGE_TOKEN)
        if not text.endswith(IMAGE_TOKEN)
    ]
    if inside:
        problem = f"{IMAGE_TOKEN} stands inside the text, and is taken out of it"
        mend = "Put it first, or leave it out: the chat template places the image"
        return [note(file, "prompt", problem, mend, **more)]
    return []


def _without_segments(row: dict[str, Any]) -> dict[str, Any]:
    ours = json.loads(row[OURS])
    ours.pop("segments", None)
    return {**row, OURS: json.dumps(ours)}


_STAND_INS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "images": lambda row: {**row, "images": [{"bytes": b"-"}], "rejected_images": []},
    "prompt": lambda row: {**row, "prompt": "a prompt that stands in"},
    "chosen": lambda row: {**row, "chosen": "a chosen answer that stands in"},
    "rejected": lambda row: {**row, "rejected": "a rejected answer that stands in"},
    "segments": _without_segments,
    OURS: lambda row: {**row, OURS: None},
}
