"""Fields of a released row, checked: what is wrong with one is a RecordError of a fixed reason."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from data_builders.sources._released import SourceError
from mlalign.images import open_image
from mlalign.records import IMAGE_TOKEN, ImageRef, RecordError

_MEND = "Mend or remove the row"


def value_of(row: dict[str, Any], key: str, record_id: str) -> Any:
    """A field that has to be there."""
    if row.get(key) is None:
        raise RecordError(record_id, key, "missing", _MEND)
    return row[key]


def text_of(row: dict[str, Any], key: str, record_id: str) -> str:
    """A field that has to be text."""
    return as_text(value_of(row, key, record_id), key, record_id)


def as_text(value: Any, key: str, record_id: str) -> str:
    """The value, which has to be text."""
    if not isinstance(value, str):
        raise RecordError(record_id, key, f"is {type(value).__name__}, not text", _MEND)
    return value


def question_of(text: str, key: str, record_id: str) -> str:
    """A user's text without the tag of the one image: the chat template places it."""
    if text.count(IMAGE_TOKEN) > 1:
        problem = f"more than one {IMAGE_TOKEN}"
        raise RecordError(record_id, key, problem, "A record has exactly one image; remove the row")
    return text.replace(IMAGE_TOKEN, "").strip()


def json_of(row: dict[str, Any], key: str, record_id: str) -> dict[str, Any]:
    """A field that holds a mapping, mostly as a JSON string."""
    value = value_of(row, key, record_id)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RecordError(record_id, key, "is not JSON", _MEND) from error
    return as_mapping(value, key, record_id)


def as_mapping(value: Any, key: str, record_id: str) -> dict[str, Any]:
    """The value, which has to be a mapping."""
    if not isinstance(value, dict):
        raise RecordError(record_id, key, f"is {type(value).__name__}, not a mapping", _MEND)
    return value


def number_of(value: Any, key: str, record_id: str) -> float:
    """A finite number, given as one or as text."""
    try:
        number = float(value) if isinstance(value, (str, int, float)) else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise RecordError(record_id, key, "is not a number", _MEND)
    return number


def told(value: Any) -> Any:
    """A JSON string opened, for the record's origin; anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def image_of(
    value: Any, record_id: str, images: str | Path | None = None, *, own: bool = False
) -> tuple[ImageRef, str]:
    """The one image of a row and its SHA-256, after decoding it once.

    ``value``: bytes and name as Parquet holds them, a path, or a list of exactly one of these.
    ``images``: the folder where paths are looked up, whole or by their last part; ``own``: the
    file is the user's, whose paths may lead anywhere. Raises RecordError, and SourceError where a
    path needs a folder that was not given.
    """
    if isinstance(value, list):
        if len(value) != 1:
            problem = "several images" if value else "no image"
            raise RecordError(
                record_id, "image", problem, "A record has exactly one; remove the row"
            )
        value = value[0]
    if isinstance(value, dict):
        data, value = value.get("bytes"), value.get("path")
        if data is not None:
            if not isinstance(data, bytes):
                problem = f"bytes are {type(data).__name__}, not binary"
                raise RecordError(record_id, "image", problem, _MEND)
            name = value if isinstance(value, str) else None
            return checked(ImageRef(path=name, data=data), record_id)
    if value is None:
        raise RecordError(record_id, "image", "missing", _MEND)
    if not isinstance(value, str) or not value or "\0" in value:
        raise RecordError(record_id, "image", "is neither bytes nor a path", _MEND)
    return checked(ImageRef(path=str(_find(value, record_id, images, own))), record_id)


def checked(image: ImageRef, record_id: str) -> tuple[ImageRef, str]:
    """The image and its SHA-256 after decoding it once. Raises RecordError."""
    open_image(image, record_id)
    return image, image.sha256()


def _find(name: str, record_id: str, images: str | Path | None, own: bool) -> Path:
    """The file of an image path. A release's paths stay inside ``images``, where they may have
    lost their folders; a user's ``own`` paths are taken as they are."""
    if images is None:
        raise SourceError(
            f"images: {record_id} names its image {name!r}, but the release holds no images here. "
            "Give the folder that they lie in"
        )
    root = Path(images).expanduser()
    inside = not os.path.isabs(name) and not os.path.normpath(name).startswith("..")
    tried = [root / name] if own or inside else []
    tried += [] if own else [root / Path(name).name]
    for path in tried:
        if path.is_file():
            return path
    raise RecordError(
        record_id,
        "image",
        f"cannot read {tried[0]} (no such file)",
        "Fetch it, or give the folder that holds it as images",
    )
