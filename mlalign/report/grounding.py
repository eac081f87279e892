"""Section: where attention looks, layer by head, before and after."""

from __future__ import annotations

import plotly.graph_objects as go
from markupsafe import Markup

from mlalign.report import figures as fg
from mlalign.report import maps, series
from mlalign.report import readings as rd
from mlalign.report.cubes import whole
from mlalign.report.folder import Run
from mlalign.report.section import Group, Section, panels

PROBE = "attention_grounding"
FIRST = ("image_mass", "box_lift")
"""Metrics that the map offers first; the others follow in the order of their files."""
LAYERED = ("image_mass", "box_lift")
"""Metrics drawn by layer."""
NOTE = (
    "Rows that produce the response's tokens, over the fixed probe set. Attention can move without "
    "any effect on the answer: read it beside image reliance. A change below the noise floor (the "
    "same model read twice) is no change."
)


def section(run: Run, figures: fg.Figures) -> Section:
    """The map of heads with its slider, every number, and per arm the lines by layer."""
    found = sorted(whole(run).heads, key=lambda c: _order(c.probe, c.metric))
    kept, said = maps.fit(found, maps.HEAD_BYTES)
    html = Markup("")
    if kept:
        html += Markup("<h3>Layer by head</h3>") + maps.head_map(figures, kept)
    numbers = series.block(run, figures, PROBE)
    if numbers:
        html += Markup("<h3>Over the probe set</h3>") + numbers
    groups = [
        Group(name=arm, html=panels(figures, drawn, title="By layer, mean over heads, last pass"))
        for arm in run.arms
        if (drawn := _lines(run, arm))
    ]
    shown = bool(html or groups)
    return Section(
        id="grounding",
        title="Grounding of attention",
        note=f"{NOTE} {said}".strip() if shown else "",
        html=html,
        groups=tuple(groups),
        empty="" if shown else f"no probes were logged: {PROBE} did not run",
    )


def _order(probe: str, metric: str) -> tuple[bool, int]:
    place = FIRST.index(metric) if metric in FIRST else len(FIRST)
    return probe != PROBE, place


def _lines(run: Run, arm: str) -> list[tuple[go.Figure, str]]:
    passes = [t for t in run.reading_tables if (t.arm, t.probe) == (arm, PROBE)]
    rows = passes[-1].rows(metric=LAYERED) if passes else []
    lines = [
        (_by_layer(rows, "image_mass", ("real", "absent"), "share of attention"), "image mass"),
        (_by_layer(rows, "box_lift", ("real",), "lift, chance = 1"), "box lift"),
    ]
    return [(fig, title) for fig, title in lines if fig.data]


def _by_layer(rows: list[rd.Row], metric: str, groups: tuple[str, ...], unit: str) -> go.Figure:
    traces = []
    for group in groups:
        for side in ("base", "adapted"):
            pooled = rd.by_layer(rows, metric, group=group, side=side)
            if not pooled:
                continue
            i = groups.index(group)
            name = f"{side}, {'there' if group == 'real' else 'not there'}"
            traces.append(
                go.Scatter(
                    x=list(pooled),
                    y=[p.mean for p in pooled.values()],
                    error_y={
                        "type": "data",
                        "array": [p.half for p in pooled.values()],
                        "thickness": 1,
                        "width": 2,
                    },
                    text=[p.text for p in pooled.values()],
                    mode="lines+markers",
                    name=name,
                    line={
                        "color": fg.colour(i),
                        "dash": "dot" if side == "base" else "solid",
                        "width": 2,
                    },
                    marker={"symbol": "circle-open" if side == "base" else "circle", "size": 7},
                    hovertemplate=f"{name}, layer %{{x}}<br>%{{text}}<extra></extra>",
                )
            )
    fig = fg.figure(traces, x="layer", y=unit)
    fig.update_xaxes(dtick=max(1, len(traces[0].x) // 8) if traces else 1)
    return fig
