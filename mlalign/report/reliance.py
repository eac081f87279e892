"""Section: does the answer, and what was learned, depend on the image?"""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from mlalign.report import figures as fg
from mlalign.report import readings as rd
from mlalign.report import series
from mlalign.report.cubes import whole
from mlalign.report.folder import Run
from mlalign.report.section import Group, Section, panels

PROBES = ("image_reliance", "vcd_gap", "attention_knockout", "image_gradient")
"""What this section shows; the first is what it cannot do without."""
BLOCKS = ("early", "middle", "late", "all")
"""Thirds of the decoder blocks in which the image's columns are hidden, and all of them."""
NATS, SHARE = "nats per token", "share of pairs"
PANELS: tuple[tuple[str, str, str, str, str, str], ...] = (
    ("image_reliance", "blank_per_token", "chosen", "adapted", "Chosen answer: blank image", NATS),
    (
        "image_reliance",
        "swapped_per_token",
        "chosen",
        "adapted",
        "Chosen answer: another image",
        NATS,
    ),
    ("vcd_gap", "gap_per_token", "chosen", "adapted", "Chosen answer: noised image", NATS),
    ("image_reliance", "blank_per_token", "own", "adapted", "Own answer: blank image", NATS),
    (
        "image_gradient",
        "gradient_share_image",
        "chosen",
        "adapted",
        "Gradient on the image",
        "share of the gradient",
    ),
    ("image_reliance", "preferred", "", "adapted", "Pairs whose chosen side is likelier", SHARE),
    (
        "image_reliance",
        "kept_blank",
        "",
        "delta",
        "Learned preference that survives a blank image",
        SHARE,
    ),
    (
        "image_reliance",
        "kept_swapped",
        "",
        "delta",
        "Learned preference that survives another image",
        SHARE,
    ),
)
"""(probe, metric, group, side, title, unit)."""
NOTE = (
    "Log-prob of an answer with its image minus with a changed one: zero means that the image does "
    "not matter. What was learned survives a blank image where it does not look: near 1 the "
    "preference is the same without the image. Bands are 95 % intervals over the probe set's "
    "records; the grey line is the base model, the grey band about it the noise floor."
)


def section(run: Run, figures: fg.Figures) -> Section:
    """One panel per measure, one line per arm over the steps; the knock-out; every number."""
    rows = {probe: whole(run).numbers.get(probe, []) for probe in PROBES}
    drawn = [(fig, p[4]) for p in PANELS if (fig := _panel(rows[p[0]], run.arms, p)).data]
    bars = _knockout(rows["attention_knockout"], run.arms)
    if bars.data:
        label = "Image hidden from attention: what the chosen answer loses, last pass"
        drawn.append((bars, label))
    groups = [
        Group(name=probe.replace("_", " "), html=html)
        for probe in PROBES
        if (html := series.block(run, figures, probe))
    ]
    return Section(
        id="reliance",
        title="Reliance on the image",
        note=NOTE if groups else "",
        html=panels(figures, drawn, three=True),
        groups=tuple(groups),
        empty="" if groups else f"no probes were logged: {PROBES[0]} did not run",
    )


def _panel(
    rows: list[rd.Row], arms: list[str], panel: tuple[str, str, str, str, str, str]
) -> go.Figure:
    _, metric, group, side, _, unit = panel
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
        change = rd.points(rows, metric, group=group, side="delta")
        noise = max((p.noise for p in [*change, *base] if not math.isnan(p.noise)), default=0.0)
        traces = [*_base(base, rows, noise), *traces]
    fig = fg.figure(traces, x="optimiser step", y=unit)
    if unit == SHARE:
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


def _base(base: list[rd.Point], rows: list[rd.Row], noise: float) -> list[go.Scatter]:
    """The base model does not change: one flat line, within the noise floor."""
    value, ends = base[0].value, [0, max(1, *(r["step"] for r in rows))]
    floor = go.Scatter(
        x=ends + ends[::-1],
        y=[value + noise] * 2 + [value - noise] * 2,
        fill="toself",
        fillcolor="rgba(91,100,112,0.22)",
        line={"width": 0},
        mode="lines",
        showlegend=False,
        hoverinfo="skip",
    )
    line = go.Scatter(
        x=ends,
        y=[value] * 2,
        text=[base[0].text] * 2,
        mode="lines",
        name="base",
        line={"color": fg.NEUTRAL, "width": 1.5},
        hovertemplate="base<br>%{text}<extra></extra>",
    )
    return [floor, line] if noise else [line]


def _knockout(rows: list[rd.Row], arms: list[str]) -> go.Figure:
    """Bars by block third, the base and every arm beside each other, at the last pass."""
    traces: list[go.Bar] = []
    for side, arm in [("base", arm) for arm in arms[:1]] + [("adapted", arm) for arm in arms]:
        found = {
            block: read[-1]
            for block in BLOCKS
            if (
                read := rd.points(
                    rows, f"drop_{block}_per_token", group="chosen", side=side, arm=arm
                )
            )
        }
        if found:
            traces.append(_bars(found, "base" if side == "base" else arm, side, arms.index(arm)))
    fig = fg.figure(traces, x="blocks in which the image is hidden", y=NATS)
    return fig.update_layout(barmode="group", bargap=0.25)


def _bars(found: dict[str, rd.Point], name: str, side: str, i: int) -> go.Bar:
    points = list(found.values())
    known = [not math.isnan(p.low) for p in points]
    return go.Bar(
        x=list(found),
        y=[p.value for p in points],
        error_y={
            "type": "data",
            "array": [p.high - p.value if k else 0 for p, k in zip(points, known, strict=True)],
            "arrayminus": [p.value - p.low if k else 0 for p, k in zip(points, known, strict=True)],
            "thickness": 1.2,
            "width": 3,
        },
        text=[p.text for p in points],
        textposition="none",
        name=name,
        marker={"color": fg.NEUTRAL if side == "base" else fg.colour(i)},
        hovertemplate=f"{name}, %{{x}} blocks<br>%{{text}}<br>{NATS}<extra></extra>",
    )
