"""Pair files with known faults in known rows, and recipes around them. No torch."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import yaml

from tests.train.pairs import make_pairs

LONG = "kitchen " * 150
"""Longer than ``MAX_LENGTH``, shorter than the model's 512 positions."""
ENDLESS = "kitchen " * 700
MAX_LENGTH = 120


def clean_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows without a fault, with their images as files in ``folder``."""
    rows = []
    for number, pair in enumerate(make_pairs(count)):
        name = f"{number}.png"
        (folder / name).write_bytes(pair.image.read())
        rows.append(
            {
                "id": f"r{number + 1}",
                "images": [name],
                "prompt": pair.prompt,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
            }
        )
    return rows


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0")
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def plant(folder: Path, rows: list[dict[str, Any]]) -> list[tuple[int, str | None, str]]:
    """Break rows in place; returns (row from 1, record, kind) of all that was planted, in order."""
    png = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "text.png").write_text("hello")
    (folder / "bomb.png").write_bytes(bomb())
    segment = {"side": "chosen", "start": 3, "end": 9999, "label": "edit"}
    changes: dict[int, tuple[dict[str, Any], tuple[str, ...]]] = {
        3: ({"chosen": " "}, ("chosen: empty",)),
        5: (
            {"rejected": rows[4]["chosen"]},
            ("rejected: equal to chosen, so the pair prefers nothing",),
        ),
        7: ({"id": "r2"}, ("id: that of another row",)),
        9: ({**rows[0], "id": "r9"}, ("pair: given twice",)),
        11: ({"images": ["gone.png"]}, ("image cannot be read",)),
        13: ({"images": ["cut.png"]}, ("image is truncated or damaged",)),
        15: ({"images": ["text.png"]}, ("image file is not an image",)),
        17: ({"images": ["bomb.png"]}, ("image has too many pixels",)),
        19: ({"prompt": LONG}, ("no completion token left after max_length",)),
        21: ({"prompt": ENDLESS}, ("tokens: longer than the model's positions",)),
        23: (
            {"record": json.dumps({"segments": [segment]})},
            ("segments: span outside of the text",),
        ),
        25: ({"chosen": "<image> A mug."}, ("chosen: contains <image>",)),
        27: ({"rejected": None}, ("rejected: missing, but one assistant message is needed",)),
        29: ({"images": []}, ("images: 0 images, but a record has exactly one",)),
        31: (
            {"images": ["0.png", "1.png"]},
            ("images: 2 images, but a record has exactly one",),
        ),
        33: ({"prompt": "<image> and <image>?"}, ("prompt: places several images",)),
        35: (
            {"chosen": "a " * 120 + "mug", "rejected": "a " * 120 + "pot"},
            ("chosen equals rejected after max_length",),
        ),
        37: ({"record": "{not json"}, ("record: damaged",)),
        # Three faults in one row.
        39: (
            {"prompt": "", "rejected": "<image>", "images": ["text.png"]},
            ("prompt: empty", "rejected: contains <image>", "image file is not an image"),
        ),
    }
    expected: list[tuple[int, str | None, str]] = []
    for number, (change, kinds) in changes.items():
        rows[number - 1] |= change
        expected += [(number, rows[number - 1]["id"], kind) for kind in kinds]
    return expected


def write(file: Path, rows: list[Any]) -> Path:
    """JSON lines; a text stands as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


def recipe(file: Path, pairs: Path | None = None, **sections: dict[str, Any]) -> Path:
    """A recipe without a fault over a pairs file, but for what ``sections`` change."""
    raw: dict[str, Any] = {
        "name": "checked",
        "model": {"path": "builtin:microworld", "dtype": "float32"},
        "data": {"vocabulary": "microworld"},
        "train": {
            "objective": {"name": "dpo", "beta": 0.5},
            "learning_rate": 1e-4,
            "batch_size": 2,
            "steps": 1,
        },
        "launch": {"launcher": "none"},
    }
    if pairs is not None:
        raw["data"]["pairs"] = {"ours": str(pairs)}
    for name, changed in sections.items():
        raw[name] = {**raw.get(name, {}), **changed}
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file
