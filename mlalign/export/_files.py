"""What exporters share: images as files of their own, rows as JSON lines."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mlalign.records import ImageRef

Tag = Literal["<image>", "<image>\n"]
"""How a prompt begins. LLaVA-1.5 was trained with a line break after the image, Qwen-VL without."""

IMAGES = "images"
_SUFFIXES = {"JPEG": ".jpg"}


def image_file(image: ImageRef, folder: Path) -> str:
    """Writes the encoded bytes below ``folder`` as they are, named by their hash; its path there.

    The same image is one file, however many pairs have it.
    """
    data = image.read()
    with Image.open(io.BytesIO(data)) as opened:
        kind = str(opened.format)
    suffix = _SUFFIXES.get(kind, f".{kind.lower()}")
    name = f"{IMAGES}/{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
    file = folder / name
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
    return name


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, one at a time."""
    with file.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
