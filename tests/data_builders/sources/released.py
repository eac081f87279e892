"""What the tests of released sets share: their fixtures, and images in place of the released."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mlalign.images import to_png
from mlalign.records import Preference, Skip

FIXTURES = Path(__file__).parent / "fixtures"

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
"""An image as ``datasets`` stores it."""


def png(number: int) -> bytes:
    """A small image of its own for each number."""
    return to_png(Image.new("RGB", (8, 6), (40 * number % 256, 90, 120)))


def pictures(folder: Path, *names: str) -> Path:
    """A folder that holds an image under each name."""
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    return folder


def fixture(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


def image_cell(said: dict[str, Any] | None) -> dict[str, Any] | None:
    """The image that a fixture stands for: {png: number, cut: bytes kept} or {text: its bytes}."""
    if said is None:
        return None
    data = said["text"].encode() if "text" in said else png(said["png"])[: said.get("cut")]
    return {"bytes": data, "path": said["path"]}


def parquet(file: Path, rows: Iterable[dict[str, Any]], image: str = "image") -> Path:
    """Rows of a fixture as the Parquet file of a release, the images inside."""
    rows = [{**row, image: image_cell(row[image])} for row in rows]
    texts = {key: pa.string() for key in rows[0] if key != image}
    schema = pa.schema({**texts, image: IMAGE})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return file


def read(source: Any, limit: int | None = None, seed: int = 0) -> list[Any]:
    """Every pair and skip of a source, whose ids are all different."""
    records = list(source.pairs(limit, seed))
    made = [record.id for record in records if isinstance(record, Preference)]
    assert len(set(made)) == len(made)
    return records


def pairs(records: Iterable[Any]) -> dict[str, Preference]:
    return {r.id: r for r in records if isinstance(r, Preference)}


def skips(records: Iterable[Any]) -> dict[str, str]:
    """Reason by id."""
    return {r.id: r.reason for r in records if isinstance(r, Skip)}


def check_details(records: Iterable[Any], file: Path) -> None:
    """Each skip's detail names the file and the row, and says what to do about it."""
    for record in records:
        if isinstance(record, Skip):
            place, _, rest = record.detail.partition(": ")
            name, _, row = place.rpartition(":")
            assert name == str(file) and int(row) > 0, record
            assert rest
