"""Training curves by arm: loss, margin, accuracy, log-probs. One small panel per quantity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

from mlalign.report import figures as fg
from mlalign.report.folder import Run
from mlalign.report.metrics import is_number
from mlalign.report.section import Section, panels

PANELS: tuple[tuple[str, str, str], ...] = (
    ("loss", "Loss", "loss (nats)"),
    ("rewards/margins", "Reward margin, chosen \u2212 rejected", "margin (nats \u00d7 \u03b2)"),
    ("rewards/accuracies", "Pairs with a positive margin", "share of pairs"),
    ("logps/chosen", "Log-prob of the chosen answer", "nats per answer"),
    ("logps/rejected", "Log-prob of the rejected answer", "nats per answer"),
    ("grad_norm", "Gradient norm", "norm before clipping"),
)
"""(metric, title, axis title)."""
NOISY = 30
"""Logged steps from which on a running mean is drawn."""
SMOOTH = 0.85
"""Weight of the past in the running mean that is drawn over the raw points."""


def training(
    rows: list[dict[str, Any]],
    arms: list[str],
    shown: Iterable[tuple[str, str, str]] = PANELS,
) -> list[tuple[go.Figure, str]]:
    """(figure, label) per quantity of ``shown`` that was logged."""
    drawn = []
    for key, title, unit in shown:
        traces = []
        for i, arm in enumerate(arms):
            steps, values = series(rows, arm, key)
            if steps:
                traces += _traces(i, arm, steps, values, title)
        if traces:
            drawn.append((fg.figure(traces, x="optimiser step", y=unit), title))
    return drawn


def series(rows: Iterable[dict[str, Any]], arm: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric of one arm, in order; a step that stands twice counts last."""
    found = {
        r["step"]: float(r[key]) for r in rows if r.get("arm") == arm and is_number(r.get(key))
    }
    steps = sorted(found)
    return steps, [found[s] for s in steps]


def running_mean(values: list[float], weight: float = SMOOTH) -> list[float]:
    """Exponential running mean with the start-up bias taken out."""
    means, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        means.append(mean / (1 - weight**i))
    return means


def _traces(i: int, arm: str, steps: list[int], values: list[float], title: str) -> list[Any]:
    noisy = len(steps) > NOISY
    drawn = []
    if noisy:
        drawn.append(
            go.Scatter(
                x=steps,
                y=values,
                mode="lines",
                line={"color": fg.faint(i, 0.3), "width": 1},
                showlegend=False,
                hoverinfo="skip",
            )
        )
    drawn.append(
        go.Scatter(
            x=steps,
            y=running_mean(values) if noisy else values,
            customdata=values,
            mode="lines" if noisy else "lines+markers",
            line=fg.line(i),
            marker={"symbol": fg.SYMBOLS[i % len(fg.SYMBOLS)], "size": 6},
            name=arm,
            hovertemplate=f"{arm}, step %{{x}}<br>{title}: %{{customdata:.4g}}"
            + ("<br>running mean %{y:.4g}" if noisy else "")
            + "<extra></extra>",
        )
    )
    return drawn


def section(run: Run, figures: fg.Figures) -> Section:
    """Section: how training went."""
    drawn = training(run.metrics, run.arms)
    note = "Thin lines are single steps, thick ones their running mean."
    return Section(
        id="training",
        title="Training",
        note=note if len(run.metrics) > NOISY * len(run.arms) else "",
        html=panels(figures, drawn, three=True),
        empty="" if drawn else "no metrics.jsonl: no training was logged",
    )
