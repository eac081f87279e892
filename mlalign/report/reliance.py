"""Section: does the answer, and what was learned, depend on the image?"""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from mlalign.report import figures as fg
from mlalign.report import readings as rd
from mlalign.report.folder import Run
from mlalign.report.section import Section, panels

PROBE = "image_reliance"
PANELS: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "blank_per_token",
        "chosen",
        "adapted",
        "Chosen answer: image against blank",
        "nats per token",
    ),
    (
        "swapped_per_token",
        "chosen",
        "adapted",
        "Chosen answer: image against another",
        "nats per token",
    ),
    ("blank_per_token", "own", "adapted", "Own answer: image against blank", "nats per token"),
    ("preferred", "", "adapted", "Pairs whose chosen side is likelier", "share of pairs"),
    ("kept_blank", "", "delta", "Learned preference that survives a blank image", "share of pairs"),
    (
        "kept_swapped",
        "",
        "delta",
        "Learned preference that survives another image",
        "share of pairs",
    ),
)
"""(metric, group, side, title, unit)."""
NOTE = (
    "Log-prob of an answer with its image minus without it: zero means that the image does not "
    "matter. The last two ask whether what was learned looks at all: near 1 the preference is the "
    "same without the image. Bands are 95 % intervals over the probe set's records, the grey line "
    "is the base model."
)


def section(run: Run, figures: fg.Figures) -> Section:
    """One panel per measure, one line per arm over the steps."""
    rows = run.probe(PROBE, record="")
    drawn = [(fig, panel[3]) for panel in PANELS if (fig := _panel(rows, run.arms, panel)).data]
    return Section(
        id="reliance",
        title="Reliance on the image",
        note=NOTE if drawn else "",
        html=panels(figures, drawn, three=True),
        empty="" if drawn else f"no probes were logged: {PROBE} did not run",
    )


def _panel(rows: list[rd.Row], arms: list[str], panel: tuple[str, str, str, str, str]) -> go.Figure:
    metric, group, side, _, unit = panel
    traces: list[Any] = []
    for i, arm in enumerate(arms):
        found = rd.points(rows, metric, arm=arm, group=group, side=side)
        if found:
            traces += _band(found, i)
            traces.append(_line(found, arm, i, unit))
    base = next(
        (b for arm in arms if (b := rd.points(rows, metric, arm=arm, group=group, side="base"))), []
    )
    if base and side == "adapted" and traces:
        traces.insert(0, _base(base, rows))
    fig = fg.figure(traces, x="optimiser step", y=unit)
    if unit == "share of pairs":
        fig.update_yaxes(range=[-0.03, 1.05])
    return fig


def _line(found: list[rd.Point], arm: str, i: int, unit: str) -> go.Scatter:
    return go.Scatter(
        x=[p.step for p in found],
        y=[p.value for p in found],
        text=[p.text for p in found],
        mode="lines+markers",
        name=arm,
        line=fg.line(i),
        marker={"symbol": fg.SYMBOLS[i % len(fg.SYMBOLS)], "size": 6},
        hovertemplate=f"{arm}, step %{{x}}<br>%{{text}}<br>{unit}<extra></extra>",
    )


def _band(found: list[rd.Point], i: int) -> list[go.Scatter]:
    known = [p for p in found if not math.isnan(p.low)]
    if not known:
        return []
    steps = [p.step for p in known]
    return [
        go.Scatter(
            x=steps + steps[::-1],
            y=[p.high for p in known] + [p.low for p in known][::-1],
            fill="toself",
            fillcolor=fg.faint(i, 0.12),
            line={"width": 0},
            showlegend=False,
            hoverinfo="skip",
            mode="lines",
        )
    ]


def _base(base: list[rd.Point], rows: list[rd.Row]) -> go.Scatter:
    """The base model does not change: one flat line."""
    last = max(r["step"] for r in rows)
    return go.Scatter(
        x=[0, max(last, 1)],
        y=[base[0].value] * 2,
        text=[base[0].text] * 2,
        mode="lines",
        name="base",
        line={"color": fg.NEUTRAL, "width": 1.5},
        hovertemplate="base<br>%{text}<extra></extra>",
    )
