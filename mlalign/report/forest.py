"""Before and after with their 95 % intervals, one small panel per metric."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from mlalign.report import figures as fg
from mlalign.report import metrics as m
from mlalign.report.table import columns

SHOWN = (
    "halluc/chair_i",
    "halluc/chair_s",
    "halluc/recall",
    "halluc/length",
    "pope/accuracy",
    "pope/yes_rate",
    "lm/clean_caption_nll",
)
SYMBOLS = {"before": "circle-open", "after": "circle"}


def panels(summary: dict[str, Any]) -> list[tuple[go.Figure, str]]:
    """(figure, label) per metric of SHOWN that the summary holds."""
    drawn = []
    present = {metric.key: metric for metric in m.metrics_of(summary)}
    for key in SHOWN:
        if key in present:
            metric = present[key]
            drawn.append((_panel(summary, metric), f"{metric.label}: {metric.help}"))
    return drawn


def _panel(summary: dict[str, Any], metric: m.Metric) -> go.Figure:
    traces = []
    arms = list(summary["builders"])
    shown = columns(summary)
    names = [column.title for column in shown]
    for column, name in zip(shown, names, strict=True):
        found = m.reading(column.values, metric)
        if found is None:
            continue
        colour = fg.colour(arms.index(column.arm)) if column.arm else fg.NEUTRAL
        low, high = found.interval or (found.value, found.value)
        interval = m.shown_interval(found, metric) or "no interval"
        traces.append(
            go.Scatter(
                x=[found.value],
                y=[name],
                mode="markers",
                error_x={
                    "type": "data",
                    "array": [max(high - found.value, 0.0)],
                    "arrayminus": [max(found.value - low, 0.0)],
                    "thickness": 1.6,
                    "width": 4,
                },
                marker={
                    "color": colour,
                    "symbol": SYMBOLS.get(column.side, "x"),
                    "size": 9,
                    "line": {"width": 2, "color": colour},
                },
                hovertemplate=f"{name}<br>{m.shown(found.value, metric)} {metric.unit} {interval}"
                + (f"<br>n = {found.n}" if found.n else "")
                + "<extra></extra>",
            )
        )
    better = {"lower": " (lower is better)", "higher": " (higher is better)", "none": ""}
    fig = fg.figure(
        traces,
        x=f"{metric.unit}{better[metric.better]}",
        y="",
        legend=False,
        height=62 + 24 * len(names),
    )
    fig.update_yaxes(categoryorder="array", categoryarray=names[::-1], title=None, ticks="")
    return fig
