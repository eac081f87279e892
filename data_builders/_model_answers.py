"""Answers of a writing model read strictly: one JSON object with named keys, or a named fault."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_FENCED = re.compile(r"\A```[A-Za-z]*[ \t]*\n(.*?)\n?[ \t]*```\Z", re.DOTALL)


class BadAnswer(ValueError):
    """An answer that cannot be used. The message is short and countable; ``detail`` is not."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


def read_object(text: str, *keys: str) -> dict[str, Any]:
    """The JSON object that ``text`` is, bare or in one fenced block; it has all of ``keys``.

    Raises BadAnswer for an empty answer, for text around the object, for what is no object, and
    naming the key that is missing. Other keys are left alone.
    """
    bare = text.strip()
    if not bare:
        raise BadAnswer("the answer is empty")
    fenced = _FENCED.match(bare)
    try:
        found = json.loads(fenced[1] if fenced else bare)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadAnswer("the answer is no JSON") from error
    if not isinstance(found, dict):
        raise BadAnswer("the answer is JSON but no object")
    for key in keys:
        if key not in found:
            raise BadAnswer(f"the answer lacks the key {key}")
    return found


def strings(value: Any, key: str) -> list[str]:
    """A list of texts, none of them empty, stripped."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadAnswer(f"{key} is not text")
    out = [item.strip() for item in value]
    if not all(out):
        raise BadAnswer(f"{key} is empty")
    return out


def text_or_none(value: Any, key: str) -> str | None:
    """A text that is not empty, or None for null."""
    return None if value is None else strings([value], key)[0]


def number(value: Any, key: str, least: float, most: float) -> float:
    """A finite number in [least, most]; a text or a truth value is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadAnswer(f"{key} is not a number")
    if not least <= value <= most:
        raise BadAnswer(f"{key} is not within {least:g} to {most:g}")
    return float(value)
