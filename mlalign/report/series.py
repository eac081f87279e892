"""A probe's numbers over the whole set: a chart over the steps, and the table it is chosen from."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any

from markupsafe import Markup

from mlalign.report import figures as fg
from mlalign.report import maps
from mlalign.report import readings as rd
from mlalign.report.cubes import SIDES, whole
from mlalign.report.folder import Run
from mlalign.report.metrics import rounded
from mlalign.report.section import render

MOST = 40
"""Passes drawn of a line; of more, evenly spaced ones."""
DASH = "\u2013"

Entry = tuple[str, str]
"""Metric and group."""
Lines = dict[str, dict[str, list[rd.Point]]]
"""Side -> arm -> points by step."""


def entries(rows: Iterable[rd.Row]) -> dict[Entry, Lines]:
    """The numbers by metric and group, in the order in which the probe gave them."""
    found: dict[Entry, dict[str, dict[str, dict[int, rd.Point]]]] = {}
    for row in rd.select(rows):
        lines = found.setdefault((row["metric"], row["group"]), {})
        lines.setdefault(row["side"], {}).setdefault(row["arm"], {})[row["step"]] = rd.point(row)
    return {
        entry: {
            side: {arm: [by_step[s] for s in sorted(by_step)] for arm, by_step in arms.items()}
            for side, arms in lines.items()
        }
        for entry, lines in found.items()
    }


def block(run: Run, figures: fg.Figures, probe: str) -> Markup:
    """Caption, chart and table of one probe, and its whole description folded; empty where it gave
    no number over the set."""
    found = entries(whole(run).numbers.get(probe, []))
    if not found:
        return Markup("")
    first, text = description(probe)
    html = Markup('<p class="note">{}</p>').format(first) if first else Markup("")
    html += chart(figures, found, run.arms, probe)
    if text:
        folded = "<details><summary>What {} reads, and how</summary><pre>{}</pre></details>"
        html += Markup(folded).format(probe, text)
    return html


def layers(run: Run, figures: fg.Figures, probe: str, title: str) -> Markup:
    """Map of what one probe reads by layer over the steps; empty where it reads nothing so."""
    found = [c for c in whole(run).layers if c.probe == probe]
    if not found:
        return Markup("")
    probes = {c.probe for c in whole(run).layers}
    kept, said = maps.fit(found, maps.LAYER_BYTES // len(probes))
    html = Markup("<h3>{}</h3>").format(title)
    html += Markup('<p class="note">{}</p>').format(said) if said else Markup("")
    return html + maps.layer_map(figures, kept, f"{probe}: {title}")


def chart(
    figures: fg.Figures,
    found: dict[Entry, Lines],
    arms: Sequence[str],
    label: str,
    colours: Sequence[int] | None = None,
) -> Markup:
    """The chart over the steps and the table of the last pass; a row of the table is a choice.

    ``colours``: number of each arm's colour; by default each has its own.
    """
    colours = range(len(arms)) if colours is None else colours
    data = {
        "arms": list(arms),
        "colours": list(colours),
        "entries": [
            {
                "name": name_of(entry),
                "sides": {
                    side: [[arms.index(arm), *_columns(points)] for arm, points in by_arm.items()]
                    for side, by_arm in lines.items()
                },
            }
            for entry, lines in found.items()
        ],
    }
    probed = {arm for lines in found.values() for by_arm in lines.values() for arm in by_arm}
    shown = [arm for arm in arms if arm in probed]
    # A probe of differences alone has no columns for the models by themselves.
    sides = [side for side in SIDES if any(side in lines for lines in found.values())]
    names = {"adapted": "adapted", "delta": "change" if len(sides) > 1 else "value"}
    table = render(
        "numbers.html.j2",
        base="base" in sides,
        sides=[names[side] for side in sides if side != "base"],
        arms=[{"name": arm, "colour": fg.colour(colours[arms.index(arm)])} for arm in shown],
        rows=[_row(i, *item, shown, sides) for i, item in enumerate(found.items())],
    )
    lines = [points for by in found.values() for arm in by.values() for points in arm.values()]
    longest = max(map(len, lines))
    said = f"{MOST} of {longest} passes are drawn, evenly spaced." if longest > MOST else ""
    return Markup('<div class="series-block">{}<p class="note">{}</p>{}</div>').format(
        figures.widget("series", data, f"{label} over the steps"), said, table
    )


def name_of(entry: Entry) -> str:
    """Metric and group in words."""
    return ", ".join(part for part in entry if part)


def _columns(points: list[rd.Point]) -> list[list[Any]]:
    """Steps, values, lower and upper ends, floors, counts; null where there is none."""
    points = maps.thin(points, MOST)
    return [
        [p.step for p in points],
        *([_short(getattr(p, name)) for p in points] for name in ("value", "low", "high", "noise")),
        [p.n for p in points],
    ]


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if value == value else None


def _row(
    place: int, entry: Entry, lines: Lines, arms: Sequence[str], sides: Sequence[str]
) -> dict[str, Any]:
    """Base, then adapted and change of each arm, at its last pass."""
    base = next(iter(lines.get("base", {}).values()), None)
    cells = [_cell(base[-1] if base else None)] if "base" in sides else []
    for arm in arms:
        for side in [side for side in sides if side != "base"]:
            points = lines.get(side, {}).get(arm)
            sign = side == "delta" and bool(base)
            first = side == ("adapted" if "adapted" in sides else "delta")
            cells.append({**_cell(points[-1] if points else None, sign=sign), "first": first})
    last = [points[-1] for side in SIDES[::-1] for points in lines.get(side, {}).values()]
    noise = next((p.noise for p in last if p.noise == p.noise), None)
    return {
        "place": place,
        "metric": entry[0],
        "group": entry[1],
        "cells": cells,
        "noise": DASH if noise is None else f"{noise:.2g}",
        "n": last[0].n if last else DASH,
    }


def _cell(point: rd.Point | None, *, sign: bool = False) -> dict[str, Any]:
    if point is None:
        return {"value": DASH, "interval": "", "bold": False, "first": False}
    value, interval, clear = texts(point, sign=sign)
    return {"value": value, "interval": interval, "bold": clear, "first": False}


def texts(point: rd.Point, *, sign: bool) -> tuple[str, str, bool]:
    """Number, interval, and whether it is a change that is more than chance and than the floor.

    ``sign``: it is a change, shown with its sign; only such a one can be clear.
    """
    ends = None if point.low != point.low else (point.low, point.high)
    exact = point.value == 0 and ends is None
    value, _, interval = ("0" if exact else rounded(point.value, ends)).partition(" ")
    if sign and point.value > 0:
        value = f"+{value}"
    clear = sign and ends is not None and not ends[0] <= 0 <= ends[1]
    return value, interval, clear and not abs(point.value) <= point.noise


@cache
def description(probe: str) -> tuple[str, str]:
    """First line and whole text of a probe's docstring, read off its file; empty for one that is
    not among ``mlalign.probes``."""
    file = resources.files("mlalign") / "probes" / f"{probe}.py"
    if not file.is_file():
        return "", ""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0], text
