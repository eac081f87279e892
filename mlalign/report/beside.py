"""Sections of the comparison: one number of every probe, before and after, run beside run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup

from mlalign.report import figures as fg
from mlalign.report import metrics as m
from mlalign.report import readings as rd
from mlalign.report import series
from mlalign.report.section import Section, panels, render

if TYPE_CHECKING:
    from mlalign.report.compare import Trained

Rows = dict[str, list[rd.Row]]
"""Probe -> readings over the whole set, ``arm`` being the run's label."""
HEADLINES: tuple[tuple[str, str, str], ...] = (
    ("image_reliance", "blank_per_token", "chosen"),
    ("image_reliance", "kept_blank", ""),
    ("attention_grounding", "image_mass", "real"),
    ("attention_grounding", "box_lift", "real"),
    ("attention_grounding", "real_vs_absent_auroc", ""),
    ("neuron_drift", "rms", "response"),
    ("vcd_gap", "gap_per_token", "chosen"),
    ("attention_knockout", "drop_all_per_token", "chosen"),
    ("top_drifted", "share_of_one", ""),
    ("lens_confidence", "real_vs_absent_auroc", ""),
)
"""(probe, metric, group). Of a probe that is not here, the first number that it gives."""
RANKED = "halluc/chair_i"
DASH = "\u2013"


class Headline(NamedTuple):
    """One number of one probe for every run."""

    probe: str
    name: str
    lines: series.Lines
    """Side -> label -> points by step."""

    def at(self, label: str, side: str) -> rd.Point | None:
        """Of the last pass, or of the first for the base; None where there is none."""
        points = self.lines.get(side, {}).get(label)
        return points[-1] if points else None

    def change(self, label: str) -> rd.Point | None:
        """The probe's own; else adapted minus base, without an interval."""
        own, base, adapted = (self.at(label, side) for side in ("delta", "base", "adapted"))
        if own is not None or base is None or adapted is None:
            return own
        nan = math.nan
        return rd.Point(
            adapted.step, adapted.value - base.value, nan, nan, adapted.noise, adapted.n
        )


def headlines(rows: Rows) -> list[Headline]:
    """Those of HEADLINES that any run has, then the first number of every other probe."""
    found = {probe: series.entries(read) for probe, read in rows.items()}
    made = [
        Headline(probe, series.name_of((metric, group)), found[probe][metric, group])
        for probe, metric, group in HEADLINES
        if (metric, group) in found.get(probe, {})
    ]
    for probe, entries in found.items():
        if entries and not any(h.probe == probe for h in made):
            entry = next(iter(entries))
            made.append(Headline(probe, series.name_of(entry), entries[entry]))
    return made


def table(found: Sequence[Trained], rows: Rows) -> Section:
    """Rows are runs, columns the headline of every probe: before, after, change."""
    title, anchor = "Inside the models", "inside"
    shown = headlines(rows)
    if not shown:
        return Section(id=anchor, title=title, empty="none of the runs was probed")
    groups = [
        {
            "name": f"{h.probe.replace('_', ' ')}: {h.name}",
            "help": series.description(h.probe)[0],
            "heads": ["before", "after", "change"] if _has_levels(h) else ["at the end"],
        }
        for h in shown
    ]
    body = [
        {"label": t.label, "colour": t.css, "cells": [c for h in shown for c in _cells(h, t.label)]}
        for t in found
    ]
    note = (
        "One number of every probe, at the last pass, with its 95 % interval over the probe set's "
        "records. A change is bold where its interval leaves out zero and it exceeds the noise "
        "floor. A click on a heading sorts."
    )
    html = render("beside.html.j2", groups=groups, rows=body)
    return Section(id=anchor, title=title, note=note, html=html)


def over_steps(found: Sequence[Trained], rows: Rows, figures: fg.Figures) -> Section:
    """Small multiples: one panel per headline, one line per run."""
    drawn = [
        (fig, f"{h.probe.replace('_', ' ')}: {h.name}")
        for h in headlines(rows)
        if (fig := _lines(h, found)).data
    ]
    note = "One colour for runs that differ only in their seed; the grey line is the base model."
    empty = "" if drawn else "none of the runs was probed"
    return Section(
        id="steps",
        title="Over the steps",
        note=note if drawn else "",
        html=_key(found) + panels(figures, drawn, three=True) if drawn else "",
        empty=empty,
    )


def against(found: Sequence[Trained], rows: Rows, figures: fg.Figures) -> Section:
    """Scatter: what changed inside against what changed in the hallucination rate."""
    metric = m.BY_KEY[RANKED]
    drawn = [
        (fig, f"{h.probe.replace('_', ' ')}: {h.name}")
        for h in headlines(rows)
        if (fig := _scatter(h, found, metric)).data
    ]
    note = (
        f"Across: what changed inside. Up: change of {metric.label} in points, lower is better. "
        "A dot is a run; a line-up of few dots is no proof."
    )
    return Section(
        id="against",
        title="Inside against hallucination",
        note=note if drawn else "",
        html=_key(found) + panels(figures, drawn, three=True) if drawn else "",
        empty="" if drawn else "no run was both probed and evaluated",
    )


def _key(found: Sequence[Trained]) -> Markup:
    return fg.key(list(dict.fromkeys((t.kind, t.colour) for t in found)))


def cell(
    value: str, interval: str = "", sort: float | None = None, tone: str = ""
) -> dict[str, Any]:
    """One cell of beside.html.j2."""
    return {
        "value": value,
        "interval": interval,
        "sort": "" if sort is None else sort,
        "tone": tone,
    }


def _has_levels(h: Headline) -> bool:
    return "adapted" in h.lines


def _cells(h: Headline, label: str) -> list[dict[str, Any]]:
    change = h.change(label)
    if not _has_levels(h):
        return [_cell(change)]
    cells = [_cell(h.at(label, side)) for side in ("base", "adapted")]
    return [*cells, _cell(change, sign=True)]


def _cell(point: rd.Point | None, *, sign: bool = False) -> dict[str, Any]:
    if point is None:
        return cell(DASH)
    value, interval, clear = series.texts(point, sign=sign)
    return cell(value, interval, point.value, "clear" if clear else "")


def _lines(h: Headline, found: Sequence[Trained]) -> go.Figure:
    side = "adapted" if _has_levels(h) else "delta"
    traces: list[Any] = []
    for t in found:
        points = h.lines.get(side, {}).get(t.label)
        if not points:
            continue
        traces.append(
            go.Scatter(
                x=[p.step for p in points],
                y=[p.value for p in points],
                text=[p.text for p in points],
                mode="lines+markers",
                name=t.label,
                line={**fg.line(t.colour), "width": 1.6},
                marker={"symbol": fg.symbol(t.colour), "size": 5},
                hovertemplate=f"{t.label}, step %{{x}}<br>%{{text}}<extra></extra>",
            )
        )
    base = next((p for p in h.lines.get("base", {}).values() if p), [])
    if base and traces:
        last = max(max(trace.x) for trace in traces)
        traces.insert(0, _base(base[0], last))
    return fg.figure(traces, x="optimiser step", y="", legend=False, height=220)


def _base(point: rd.Point, last: int) -> go.Scatter:
    return go.Scatter(
        x=[0, max(last, 1)],
        y=[point.value] * 2,
        text=[point.text] * 2,
        mode="lines",
        name="base",
        line={"color": fg.NEUTRAL, "width": 1.5},
        hovertemplate="base<br>%{text}<extra></extra>",
    )


def _scatter(h: Headline, found: Sequence[Trained], metric: m.Metric) -> go.Figure:
    traces = []
    for t in found:
        inside, outside = h.change(t.label), m.change(t.sides, metric)
        if inside is None or outside is None:
            continue
        text = f"{t.label}<br>{h.name}: {inside.text}<br>{metric.label}: "
        text += f"{m.signed(outside.value)} {m.shown_interval(outside, metric)}"
        low, high = outside.interval or (outside.value, outside.value)
        known = not math.isnan(inside.low)
        traces.append(
            go.Scatter(
                x=[inside.value],
                y=[outside.value],
                error_x=_whiskers(inside.value, inside.low, inside.high) if known else None,
                error_y=_whiskers(outside.value, low, high),
                mode="markers",
                name=t.label,
                marker={
                    "color": t.css,
                    "symbol": fg.symbol(t.colour),
                    "size": 9,
                },
                text=[text],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    up = f"{metric.label}, points"
    return fg.figure(traces, x="change inside", y=up, legend=False, height=220)


def _whiskers(value: float, low: float, high: float) -> dict[str, Any]:
    return {
        "type": "data",
        "array": [max(high - value, 0.0)],
        "arrayminus": [max(value - low, 0.0)],
        "thickness": 1,
        "width": 3,
    }
