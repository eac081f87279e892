"""Data of the two maps that the page's scripts draw: layer by head, and layer by pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from markupsafe import Markup

from mlalign.report import figures as fg
from mlalign.report.cubes import PARTS, Cube
from mlalign.report.pack import pack

T = TypeVar("T")
HEAD_BYTES = 1_300_000
"""What all head maps of a report may take on the page."""
LAYER_BYTES = 800_000
"""What all layer maps of a report may take on the page; every probe has the same share."""
FEWEST = 4
"""Passes kept of every map before whole maps are left out."""


def thin(steps: Sequence[T], count: int) -> list[T]:
    """At most ``count`` (at least 2) of the steps, evenly spaced, with the first and the last."""
    if len(steps) <= count:
        return list(steps)
    places = np.linspace(0, len(steps) - 1, max(count, 2)).round().astype(int)
    return [steps[i] for i in places]


def fit(cubes: Sequence[Cube], budget: int) -> tuple[list[Cube], str]:
    """The cubes with as many passes as the budget of bytes holds, and a sentence on what is not
    drawn (empty where all is). Cubes at the end are left out first."""
    kept = list(cubes)
    most = max((len(c.steps) for c in cubes), default=0)
    while len(kept) > 1 and sum(map(_bytes, kept)) * min(FEWEST, most) > budget:
        kept.pop()
    count = min(most, max(2, int(budget / max(sum(map(_bytes, kept)), 1))))
    said = []
    if count < most:
        said.append(f"{count} of {most} passes are drawn, evenly spaced")
    if len(kept) < len(cubes):
        left = sorted({f"{c.probe}: {c.name}" for c in cubes[len(kept) :]})
        said.append(f"left out are {'; '.join(left)}")
    text = f"To keep the page small, {' and '.join(said)}; the folder probes/ holds everything."
    return [c.thinned(thin(c.steps, count)) for c in kept], text if said else ""


def _bytes(cube: Cube) -> float:
    """On the page, per pass."""
    cells = cube.shape[0] * cube.shape[1]
    return 4 / 3 * cells * sum(_width(cube, side) for side in _stored(cube))


def _width(cube: Cube, side: str) -> float:
    parts = cube.sides[side]
    small = sum(bool(np.isfinite(parts[part]).any()) for part in PARTS[1:])
    # The base does not change: one pass of it stands for all.
    return (2 + small) / (len(cube.steps) if side == "base" and _constant(cube) else 1)


def _stored(cube: Cube) -> list[str]:
    return [side for side in cube.sides if not (side == "adapted" and _derived(cube))]


def _derived(cube: Cube) -> bool:
    """Whether adapted is base + delta, with no interval of its own: then the page adds."""
    if not {"base", "adapted", "delta"} <= cube.sides.keys():
        return False
    base, adapted, delta = (cube.sides[s]["value"] for s in ("base", "adapted", "delta"))
    own = any(np.isfinite(cube.sides["adapted"][part]).any() for part in PARTS[1:])
    scale = float(np.nanmax(np.abs(base), initial=1e-12))
    same = np.isclose(base + delta, adapted, atol=1e-5 * scale, rtol=1e-4, equal_nan=True)
    return not own and bool(same.all())


def _constant(cube: Cube) -> bool:
    base = cube.sides["base"]["value"]
    return bool(np.isclose(base, base[:1], rtol=1e-5, equal_nan=True).all())


def _packed(cube: Cube) -> dict[str, Any]:
    sides = {}
    for side in _stored(cube):
        parts = cube.sides[side]
        if side == "base" and _constant(cube):
            parts = {part: values[:1] for part, values in parts.items()}
        value = parts["value"]
        # Ends of an interval are kept as distances, which one byte holds well enough.
        packed = {
            "value": pack(value),
            "lo": pack(value - parts["lo"], 1),
            "hi": pack(parts["hi"] - value, 1),
            "noise": pack(parts["noise"], 1),
        }
        if packed["value"] is not None:
            sides[side] = {part: each for part, each in packed.items() if each is not None}
    return {"steps": cube.steps, "layers": cube.shape[0], "heads": cube.shape[1], "sides": sides}


def head_map(figures: fg.Figures, cubes: Sequence[Cube]) -> Markup:
    """Base, adapted and change side by side, with a choice of the metric and a slider of steps."""
    return figures.widget("headmap", data_of(cubes), "layer by head, by metric and step")


def layer_map(figures: fg.Figures, cubes: Sequence[Cube], label: str) -> Markup:
    """Layers over steps, with choices of the metric, the group and the side."""
    return figures.widget("layermap", data_of(cubes), label)


def data_of(cubes: Sequence[Cube]) -> dict[str, Any]:
    """What the scripts of both maps read."""
    maps = [
        {
            "arm": c.arm,
            "probe": c.probe,
            "metric": c.metric,
            "group": c.group,
            "zero": _zero(c),
            **_packed(c),
        }
        for c in cubes
    ]
    return {"maps": [each for each in maps if each["sides"]]}


def _zero(cube: Cube) -> bool:
    """Whether the scale of the sides themselves starts at zero: no value lies below."""
    values = [cube.sides[s]["value"] for s in ("base", "adapted") if s in cube.sides]
    values = values or [parts["value"] for parts in cube.sides.values()]
    return all(bool(np.nanmin(v, initial=0.0) >= 0) for v in values)
