"""What a section of the page is, and how its HTML is made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup

from mlalign.report.figures import Figures


@dataclass(frozen=True, kw_only=True)
class Group:
    """One tab of a section."""

    name: str
    html: Markup


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section; ``empty`` says in one line why there is nothing to show."""

    id: str
    title: str
    note: str = ""
    html: str = ""
    """Markup, safe to stand in the page as it is."""
    empty: str = ""
    groups: tuple[Group, ...] = ()
    """Tabs, below ``html``."""
    after: str = ""
    """Markup below the tabs."""


def render(template: str, **values: Any) -> Markup:
    """A template of ``assets`` with every value escaped unless it is Markup already."""
    return Markup(_environment().get_template(template).render(**values))


def panels(
    figures: Figures,
    drawn: Iterable[tuple[go.Figure, str]],
    *,
    title: str = "",
    three: bool = False,
) -> Markup:
    """Figures side by side where there is room, below each other where there is not."""
    boxes = [figures.html(fig, label) for fig, label in drawn]
    if not boxes:
        return Markup("")
    head = Markup("<h3>{}</h3>").format(title) if title else Markup("")
    css = "panels three" if three else "panels"
    return head + Markup('<div class="{}">').format(css) + Markup("").join(boxes) + Markup("</div>")


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("mlalign.report", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
