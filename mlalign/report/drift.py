"""Section: how far each layer moved from the base model, by token group, and by what update."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from markupsafe import Markup

from mlalign.report import figures as fg
from mlalign.report import readings as rd
from mlalign.report import series
from mlalign.report.folder import Run
from mlalign.report.metrics import is_number
from mlalign.report.section import Group, Section, panels

PROBE = "neuron_drift"
TOKEN_GROUPS = ("image", "prompt", "response")
PANELS: tuple[tuple[str, str, str], ...] = (
    ("rms", "Neurons moved", "relative RMS change"),
    ("cka", "Geometry kept (debiased CKA)", "linear CKA, 1 = same"),
    ("firing_rate_change", "Neurons firing otherwise", "mean |change of firing rate|"),
    ("offset", "Shift common to all tokens", "relative to the state's norm"),
    ("offset_coherence", "How common the shift is", "1 = the same for every token"),
)
"""(metric, title, unit)."""
WEIGHTS: tuple[tuple[str, str, str], ...] = (
    ("lora_norm", "LoRA update by module", "norm relative to the weight"),
    ("lora_effective_rank", "Effective rank of the update", "0 .. rank"),
)
NOTE = (
    "Base against adapted on the same tokens. The dotted line is the noise floor: the same model "
    "read twice in other batches."
)


def section(run: Run, figures: fg.Figures) -> Section:
    """Layers over the steps, every number, and per arm the last pass by layer and by module."""
    html = series.layers(run, figures, PROBE, "Layers over the steps")
    numbers = series.block(run, figures, PROBE)
    if numbers:
        html += Markup("<h3>Over all layers</h3>") + numbers
    groups = [
        Group(name=arm, html=_arm(figures, passes[-1].rows(record="")))
        for arm in run.arms
        if (passes := [t for t in run.reading_tables if (t.arm, t.probe) == (arm, PROBE)])
    ]
    shown = bool(html or groups)
    return Section(
        id="drift",
        title="Drift by layer",
        note=NOTE if shown else "",
        html=html,
        groups=tuple(groups),
        empty="" if shown else f"no probes were logged: {PROBE} did not run",
    )


def _arm(figures: fg.Figures, last: list[rd.Row]) -> Markup:
    lines = [(_lines(last, metric, unit), title) for metric, title, unit in PANELS]
    drawn = [(_modules(last, metric, unit), f"{title} ({unit})") for metric, title, unit in WEIGHTS]
    html = Markup("")
    for row in last[:1]:
        html += Markup("<h3>By layer after {} steps</h3>").format(row["step"])
    html += panels(figures, [(f, t) for f, t in lines if f.data], three=True)
    return html + panels(figures, [(f, t) for f, t in drawn if f.data])


def _lines(rows: list[rd.Row], metric: str, unit: str) -> go.Figure:
    traces = []
    for i, group in enumerate(TOKEN_GROUPS):
        found = sorted(
            (r for r in rd.select(rows, metric=metric, group=group) if r["layer"] >= 0),
            key=lambda r: r["layer"],
        )
        if not found:
            continue
        layers = [r["layer"] for r in found]
        floors = [r["noise"] if is_number(r["noise"]) else None for r in found]
        traces.append(
            go.Scatter(
                x=layers,
                y=[r["value"] for r in found],
                customdata=[
                    ["\u2013" if f is None else f"{f:.2g}", r["n"]]
                    for f, r in zip(floors, found, strict=True)
                ],
                mode="lines+markers",
                name=f"{group} tokens",
                line=fg.line(i, dash="solid"),
                marker={"symbol": fg.SYMBOLS[i], "size": 7},
                hovertemplate=f"{group} tokens, layer %{{x}}<br>%{{y:.3g}} {unit}"
                "<br>noise floor %{customdata[0]}<br>%{customdata[1]} tokens<extra></extra>",
            )
        )
        traces.append(
            go.Scatter(
                x=layers,
                y=floors,
                mode="lines",
                line={"color": fg.colour(i), "dash": "dot", "width": 1},
                showlegend=False,
                hoverinfo="skip",
            )
        )
    fig = fg.figure(traces, x="layer", y=unit)
    fig.update_xaxes(dtick=1 if traces and len(traces[0].x) <= 12 else None)
    return fig


def _modules(rows: list[rd.Row], metric: str, unit: str) -> go.Figure:
    """Layer by module; a module outside the layers is not drawn (its reading stays in the file)."""
    found = [r for r in rd.select(rows, metric=metric) if r["layer"] >= 0 and r["group"]]
    if not found:
        return go.Figure()
    modules = list(dict.fromkeys(r["group"] for r in found))
    layers = max(r["layer"] for r in found) + 1
    grid: list[list[float | None]] = [[None] * layers for _ in modules]
    for r in found:
        grid[modules.index(r["group"])][r["layer"]] = float(f"{r['value']:.4g}")
    trace = go.Heatmap(
        z=grid,
        y=[m.rpartition(".")[2] for m in modules],
        colorscale=fg.SEQUENTIAL,
        zmin=0,
        xgap=1,
        ygap=1,
        hovertemplate="%{y}, layer %{x}<br>%{z:.3g} " + unit + "<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 10}},
    )
    height = 120 + 20 * len(modules)
    fig = fg.figure([trace], x="layer", y="", legend=False, height=height)
    fig.update_xaxes(showgrid=False, dtick=max(1, math.ceil(layers / 8)))
    fig.update_yaxes(showgrid=False, autorange="reversed", title=None)
    return fig
