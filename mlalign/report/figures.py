"""What all figures share: colours that colour-blind eyes tell apart, one layout, one embedding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from markupsafe import Markup

ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7A5C00")
"""Okabe and Ito's palette without the yellow, which is too pale on white."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
NEUTRAL = "#5b6470"
INK = "#22272e"
SEQUENTIAL = "Cividis"
"""Even in lightness, the same to colour-blind eyes."""
DIVERGING = (
    (0.0, "#2166ac"),
    (0.25, "#92c5de"),
    (0.5, "#f7f7f7"),
    (0.75, "#f4a582"),
    (1.0, "#b2182b"),
)
"""Blue below zero, red above."""
HEIGHT = 290
FONT = "system-ui, -apple-system, Segoe UI, sans-serif"


def colour(index: int) -> str:
    """Colour of the arm at ``index``."""
    return ARM_COLOURS[index % len(ARM_COLOURS)]


def faint(index: int, alpha: float = 0.16) -> str:
    """The same colour, see-through: bands of an interval or a noise floor."""
    red, green, blue = (int(colour(index)[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def line(index: int, **more: Any) -> dict[str, Any]:
    """Line style of the arm at ``index``: colour and dash, so that neither is needed alone."""
    return {"color": colour(index), "dash": _shifted(DASHES, index), "width": 2, **more}


def symbol(index: int) -> str:
    """Marker of the arm at ``index``."""
    return _shifted(SYMBOLS, index)


def _shifted(options: Sequence[str], index: int) -> str:
    # Where the colours start again the shapes are others, so that thirty-six can be told apart.
    return options[(index + index // len(ARM_COLOURS)) % len(options)]


def key(names: Sequence[tuple[str, int]]) -> Markup:
    """One legend for many panels: (name, number of the colour)."""
    items = [
        Markup('<span class="arm" style="--arm:{}">{}</span>').format(colour(i), name)
        for name, i in names
    ]
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items))


def figure(
    traces: Sequence[Any],
    *,
    x: str,
    y: str,
    height: int = HEIGHT,
    legend: bool = True,
    **layout: Any,
) -> go.Figure:
    """A figure in the house layout; ``x`` and ``y`` are axis titles with their units."""
    axis = {
        "gridcolor": "#e6e8eb",
        "zeroline": False,
        "linecolor": "#c9ced6",
        "ticks": "outside",
        "exponentformat": "e",
    }
    # One dictionary: plotly checks a figure's layout anew at every update.
    whole: dict[str, Any] = {
        "template": "none",
        "height": height,
        "margin": {"l": 58, "r": 12, "t": 24 if legend else 8, "b": 46},
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": legend,
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "font": {"size": 11},
        },
        "hoverlabel": {"font": {"size": 12}, "align": "left"},
        "hovermode": "closest",
        "xaxis": {"title": {"text": x, "standoff": 8}, **axis},
        "yaxis": {"title": {"text": y, "standoff": 8}, "automargin": True, **axis},
    }
    return go.Figure(data=list(traces), layout=whole | layout)


class Figures:
    """Hands out figures as HTML with ids of their own; the page draws each when it is seen."""

    def __init__(self) -> None:
        self.count = 0

    def widget(self, kind: str, data: Any, label: str) -> Markup:
        """A box that the script ``assets/<kind>.js`` fills from ``data`` when it is seen."""
        self.count += 1
        return Markup(
            '<div class="figure widget {kind}" id="figure-{n}" data-widget="{kind}" role="group" '
            'aria-label="{label}"></div>'
            '<script type="application/json" data-for="figure-{n}">{data}</script>'
        ).format(n=self.count, kind=kind, label=label, data=dumps(data))

    def html(self, fig: go.Figure, label: str) -> Markup:
        """A box for the figure and its data, with ``label`` ("title" or "title: note") over it."""
        self.count += 1
        title, _, note = label.partition(": ")
        # "<" is escaped so that no text inside can end the script element.
        data = (pio.to_json(fig, validate=False, remove_uids=True) or "{}").replace("<", "\\u003c")
        height = int(fig.layout.height or HEIGHT)
        return Markup(
            '<figure class="plot"><figcaption>{title} <span>{note}</span></figcaption>'
            '<div class="figure" id="figure-{n}" role="img" aria-label="{label}" '
            'style="height:{height}px"></div>'
            '<script type="application/json" data-for="figure-{n}">{data}</script></figure>'
        ).format(
            n=self.count, label=label, title=title, note=note, height=height, data=Markup(data)
        )


def shared() -> Markup:
    """What the scripts that draw figures of their own need of this file, as JSON."""
    layout = json.loads(pio.to_json(figure([], x="", y=""), validate=False) or "{}")["layout"]
    return dumps(
        {
            "layout": layout,
            "colours": ARM_COLOURS,
            "dashes": DASHES,
            "symbols": SYMBOLS,
            "neutral": NEUTRAL,
            "sequential": SEQUENTIAL,
            "diverging": DIVERGING,
        }
    )


def dumps(value: Any) -> Markup:
    """JSON that is safe inside a script element. Raises ValueError for NaN, which JSON lacks."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))
