"""Attention over the image, word by word: the base model beside the aligned ones."""

from __future__ import annotations

from typing import Any

from PIL import Image

from mlalign.report import pictures

WORDS = 3
"""Words shown per record; absent ones first, since those are what alignment is about."""


COMPLETIONS = ("own", "rejected", "chosen")
"""Where a word is looked for first: in what the model itself says."""


def of(
    maps: list[dict[str, Any]], image: Image.Image, arms: list[str], mode: str
) -> list[dict[str, Any]]:
    """For each word a base map and one map per arm, on one colour scale.

    A word that is said several times is shown where it is said first.
    """
    spoken: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for row in sorted(maps, key=_place):
        rows = spoken.setdefault((bool(row["real"]), row["word"]), [])
        if not rows or _place(rows[0]) == _place(row):
            rows.append(row)
    return [
        {
            "word": word,
            "truth": "in the image" if real else "not in the image",
            "where": {"own": "the model's own answer"}.get(
                str(rows[0].get("completion")), f"the {rows[0].get('completion')} answer"
            ),
            "pictures": _pictures(rows, image, arms, mode),
        }
        for (real, word), rows in sorted(spoken.items())[:WORDS]
    ]


def _place(row: dict[str, Any]) -> tuple[int, int]:
    return COMPLETIONS.index(row["completion"]), int(row["start"])


def _pictures(
    rows: list[dict[str, Any]], image: Image.Image, arms: list[str], mode: str
) -> list[dict[str, str]]:
    named = {"base" if row["side"] == "base" else row["arm"]: row for row in rows}
    named = {name: named[name] for name in ["base", *arms] if name in named}
    top = max(v for row in named.values() for v in row["values"])
    return [
        {
            "name": name,
            "uri": pictures.data_uri(
                pictures.overlaid(
                    image,
                    row["values"],
                    (row["grid_rows"], row["grid_cols"]),
                    mode=mode,
                    top=top,
                )
            ),
        }
        for name, row in named.items()
    ]
