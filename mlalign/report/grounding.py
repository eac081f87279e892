"""Section: where attention looks, layer by head, before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from mlalign.report import figures as fg
from mlalign.report import readings as rd
from mlalign.report.folder import Run
from mlalign.report.metrics import rounded
from mlalign.report.section import Group, Section, panels, render

PROBE = "attention_grounding"
MAPS: tuple[tuple[str, str, str, str], ...] = (
    ("image_mass", "real", "Attention on the image, words that are there", "share of attention"),
    (
        "image_mass",
        "absent",
        "Attention on the image, words that are not there",
        "share of attention",
    ),
    ("box_lift", "real", "Attention inside the object's box, against chance", "lift, chance = 1"),
)
"""(metric, group, title, unit)."""
NUMBERS: tuple[tuple[str, str, str], ...] = (
    ("image_mass", "real", "image mass, words that are there"),
    ("image_mass", "absent", "image mass, words that are not there"),
    ("image_mass", "response", "image mass, all response tokens"),
    ("image_mass_no_first", "response", "the same without the first token's sink"),
    ("box_share", "real", "share of image mass inside the box"),
    ("box_lift", "real", "box lift (chance = 1)"),
    ("entropy", "response", "entropy over image tokens (1 = uniform)"),
    ("sink_first", "response", "mass on the first token"),
    ("sink_image", "response", "mass on the top image token"),
    ("real_vs_absent_auroc", "", "image mass tells real from absent words (AUROC)"),
)
NOTE = (
    "Rows that produce the response's tokens, over the fixed probe set. Attention can move without "
    "any effect on the answer: read it beside image reliance. A change below the noise floor (the "
    "same model read twice) is no change."
)


def section(run: Run, figures: fg.Figures) -> Section:
    """One tab per arm: maps of base, adapted and change; lines by layer; the numbers."""
    rows = run.probe(PROBE, last=True)
    groups = [
        Group(name=arm, html=_arm(figures, [r for r in rows if r["arm"] == arm]))
        for arm in run.arms
        if any(r["arm"] == arm for r in rows)
    ]
    return Section(
        id="grounding",
        title="Grounding of attention",
        note=NOTE if groups else "",
        groups=tuple(groups),
        empty="" if groups else f"no probes were logged: {PROBE} did not run",
    )


def _arm(figures: fg.Figures, rows: list[rd.Row]) -> Markup:
    step = max(r["step"] for r in rows)
    html = Markup('<p class="note">Base against adapted after {} steps.</p>').format(step)
    for metric, group, title, unit in MAPS:
        html += panels(figures, _maps(rows, metric, group, unit), title=title, three=True)
    lines = [
        (_by_layer(rows, "image_mass", ("real", "absent"), "share of attention"), "image mass"),
        (_by_layer(rows, "box_lift", ("real",), "lift, chance = 1"), "box lift"),
    ]
    drawn = [(fig, title) for fig, title in lines if fig.data]
    html += panels(figures, drawn, title="By layer, mean over heads")
    return html + _numbers(rows)


def _maps(rows: list[rd.Row], metric: str, group: str, unit: str) -> list[tuple[go.Figure, str]]:
    grids = {
        side: rd.layer_by_head(rows, metric, group=group, side=side)
        for side in ("base", "adapted", "delta")
    }
    if not grids["base"][0].size or not grids["adapted"][0].size:
        return []
    both = np.concatenate([grids["base"][0].ravel(), grids["adapted"][0].ravel()])
    scale: dict[str, Any] = {
        "colorscale": fg.SEQUENTIAL,
        "zmin": min(float(np.nanmin(both)), 1.0) if metric == "box_lift" else 0.0,
        "zmax": float(np.nanmax(both)),
    }
    drawn = []
    for side in ("base", "adapted"):
        drawn.append((_heat(*grids[side], side, unit, scale), side))
    change, noise = grids["delta"]
    if change.size:
        most = float(np.nanmax(np.abs(change))) or 1.0
        scale = {"colorscale": fg.DIVERGING, "zmin": -most, "zmax": most}
        drawn.append((_heat(change, noise, "change", unit, scale), "change"))
    return drawn


def _heat(
    values: np.ndarray, noise: np.ndarray, side: str, unit: str, scale: dict[str, Any]
) -> go.Figure:
    layers, heads = values.shape
    hover = [
        [
            f"{side}, layer {layer}, head {head}<br>{values[layer, head]:.3g} {unit}"
            + ("" if np.isnan(noise[layer, head]) else f"<br>noise floor {noise[layer, head]:.2g}")
            for head in range(heads)
        ]
        for layer in range(layers)
    ]
    trace = go.Heatmap(
        z=[[None if np.isnan(v) else round(float(v), 5) for v in row] for row in values],
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        xgap=1,
        ygap=1,
        colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 10}, "len": 0.95},
        **scale,
    )
    height = int(min(max(110 + 18 * layers, 200), 460))
    fig = fg.figure([trace], x="head", y="layer", legend=False, height=height)
    fig.update_xaxes(showgrid=False, dtick=max(1, heads // 8))
    fig.update_yaxes(showgrid=False, dtick=max(1, layers // 8))
    return fig


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


def _numbers(rows: list[rd.Row]) -> Markup:
    table = []
    for metric, group, label in NUMBERS:
        sides = [rd.points(rows, metric, group=group, side=s) for s in ("base", "adapted", "delta")]
        if sides[0] and sides[1]:
            cells = [_cell(side[-1]) if side else "\u2013" for side in sides]
            delta = sides[2]
            floor = "" if not delta or np.isnan(delta[-1].noise) else f"{delta[-1].noise:.2g}"
            table.append([label, *cells, floor or "\u2013", str(sides[1][-1].n)])
    if not table:
        return Markup("")
    head = ["over the probe set", "base", "adapted", "change", "noise floor", "n"]
    return render("plain.html.j2", kind="numbers", head=head, rows=table)


def _cell(point: rd.Point) -> str:
    return rounded(point.value, None if np.isnan(point.low) else (point.low, point.high))
