"""Section: before and after, as a table and as intervals."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from markupsafe import Markup

from mlalign.report import figures as fg
from mlalign.report import forest
from mlalign.report import metrics as m
from mlalign.report.folder import Run
from mlalign.report.section import Section, panels, render
from mlalign.report.table import Column, caption, columns

NOTE = (
    "A hallucination rate means nothing alone: a model that says nothing hallucinates nothing. "
    "Read it with recall, length, the yes and unparsed rates, and the loss on true captions."
)


def section(run: Run, figures: fg.Figures) -> Section:
    """The table of summary.json and its intervals drawn."""
    title = "Before and after"
    if not run.summary.get("builders"):
        empty = "no summary.json: the run was not evaluated before and after"
        return Section(id="results", title=title, empty=empty)
    html = _table(run, m.metrics_of(run.summary, known=True)) + _legend(run)
    html += panels(figures, forest.panels(run.summary), three=True)
    others = m.metrics_of(run.summary, known=False)
    if others:
        html += Markup("<details><summary>{} further measures</summary>{}</details>").format(
            len(others), _table(run, others)
        )
    return Section(id="results", title=title, note=NOTE, html=html)


def _table(run: Run, metrics: list[m.Metric]) -> Markup:
    shown = columns(run.summary)
    groups = []
    for arm, members in groupby(shown, key=lambda c: c.arm):
        sides = [c.side for c in members]
        heads = [h for side in sides for h in ([side] if side == "before" else [side, "change"])]
        colour = fg.colour(run.arms.index(arm)) if arm else ""
        groups.append({"arm": arm, "heads": heads, "colour": colour})
    rows = [
        {
            "label": metric.label,
            "unit": metric.unit,
            "help": metric.help,
            "cells": [
                cell for i in range(len(shown)) for cell in _cells(run.summary, shown, i, metric)
            ],
        }
        for metric in metrics
    ]
    return render("table.html.j2", groups=groups, rows=rows)


def _legend(run: Run) -> Markup:
    paired = any(m.CHANGE in sides for sides in run.summary["builders"].values())
    how = (
        "bold where its paired 95 % interval leaves out zero"
        if paired
        else "bold where the intervals of before and after do not overlap"
    )
    return Markup(
        '<p class="note">{}. Rates are in per cent. A change is {}; green is better, red worse.</p>'
    ).format(caption(run.summary), how)


def _cells(
    summary: dict[str, Any], shown: list[Column], i: int, metric: m.Metric
) -> list[dict[str, Any]]:
    """The number and, for any side but before, its change."""
    column = shown[i]
    first = i == 0 or shown[i - 1].arm != column.arm
    cells = [_cell(m.reading(column.values, metric), metric, first=first)]
    if column.side == "before":
        return cells
    sides = summary["builders"][column.arm]
    moved = m.change(sides, metric, column.side)
    change = _cell(moved, metric, first=False)
    if moved is not None:
        change["value"] = m.signed(moved.value, metric.digits)
        if m.is_clear(sides, metric, column.side):
            better = (moved.value < 0) == (metric.better == "lower")
            tone = "" if metric.better == "none" else " good" if better else " bad"
            change["tone"] = f"clear{tone}"
    return [*cells, change]


def _cell(found: m.Reading | None, metric: m.Metric, *, first: bool) -> dict[str, Any]:
    if found is None:
        return {"value": "\u2013", "interval": "", "tone": "", "first": first}
    value, interval = m.shown(found.value, metric), m.shown_interval(found, metric)
    return {"value": value, "interval": interval, "tone": "", "first": first}
