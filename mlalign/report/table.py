"""The before/after table of summary.json: for the terminal, as Markdown, and as plain rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mlalign.report import metrics as m

WIDTH = 100
"""Columns of the terminal that the table must fit in."""

Rows = list[tuple[m.Metric, list[tuple[str, str]]]]
"""Metric, and for each column its number and its interval as text."""


@dataclass(frozen=True)
class Column:
    """One column of numbers."""

    arm: str
    """Empty where the column is the same for all arms."""
    side: str
    values: dict[str, Any]
    """That side of the summary."""

    @property
    def title(self) -> str:
        """Arm and side."""
        return f"{self.arm} {self.side}".strip()


def columns(summary: dict[str, Any]) -> list[Column]:
    """The columns: one shared "before" where every arm started from the same numbers."""
    builders = summary.get("builders", {})
    sides = m.sides_of(summary)
    befores = [builders[arm]["before"] for arm in builders if "before" in sides[arm]]
    shared = len(befores) > 1 and all(b == befores[0] for b in befores)
    found = [Column("", "before", befores[0])] if shared else []
    for arm, names in sides.items():
        found += [
            Column(arm, side, builders[arm][side])
            for side in names
            if not (shared and side == "before")
        ]
    return found


def summary_table(summary: dict[str, Any]) -> Table:
    """The table that a run prints: rows are metrics, columns before and after; 95 % intervals.

    Where that is too wide for a terminal, intervals go below their numbers, then arms below each
    other. Splits of a benchmark stand in the report, not here.
    """
    shown_columns = columns(summary)
    rows = [(metric, _cells(metric, shown_columns)) for metric in m.metrics_of(summary, known=True)]
    table = _table(summary, shown_columns, rows, " ")
    for smaller in (lambda: _table(summary, shown_columns, rows, "\n"), lambda: _long(summary)):
        if _wide(table):
            table = smaller()
    return table


def _table(summary: dict[str, Any], shown_columns: list[Column], rows: Rows, glue: str) -> Table:
    """``glue``: what stands between a number and its interval, a blank or a line break."""
    table = _empty(summary)
    for column in shown_columns:
        head = f"{column.arm}\n{column.side}" if column.arm else column.side
        table.add_column(head, justify="right", vertical="bottom", no_wrap=True)
    for metric, cells in rows:
        table.add_row(_label(metric), *(_text(cell, glue) for cell in cells))
    return table


def _long(summary: dict[str, Any]) -> Table:
    """A row for each metric and arm, a column for each side."""
    table = _empty(summary)
    arms = m.sides_of(summary)
    sides = list(dict.fromkeys(side for names in arms.values() for side in names))
    table.add_column("", no_wrap=True)
    for side in sides:
        table.add_column(side, justify="right", no_wrap=True)
    for metric in m.metrics_of(summary, known=True):
        for i, arm in enumerate(arms):
            values = summary["builders"][arm]
            cells = _cells(metric, [Column(arm, side, values.get(side, {})) for side in sides])
            label = _label(metric) if i == 0 else ""
            table.add_row(label, arm, *(_text(cell, " ") for cell in cells))
    return table


def _empty(summary: dict[str, Any]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        caption=caption(summary),
        caption_justify="left",
        caption_style="dim",
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("", no_wrap=True)
    return table


def _text(cell: tuple[str, str], glue: str) -> Text:
    value, interval = cell
    return Text(value, style="bold").append(f"{glue}{interval}" if interval else "", "not bold dim")


def _wide(table: Table) -> bool:
    console = Console(width=1000)
    return Measurement.get(console, console.options, table).maximum > WIDTH


def markdown(summary: dict[str, Any]) -> str:
    """The same table as GitHub Markdown."""
    shown_columns = columns(summary)
    lines = [
        "| | " + " | ".join(c.title for c in shown_columns) + " |",
        "|---|" + "---:|" * len(shown_columns),
    ]
    for metric in m.metrics_of(summary, known=True):
        cells = [f"{value} {interval}".strip() for value, interval in _cells(metric, shown_columns)]
        lines.append(f"| {_label(metric)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", caption(summary)]) + "\n"


def caption(summary: dict[str, Any]) -> str:
    """What the brackets are, and over how many images and seeds."""
    counts = sorted({c.values["n"] for c in columns(summary) if m.is_number(c.values.get("n"))})
    over = f", {' or '.join(str(n) for n in counts)} images" if counts else ""
    seed = f", seed {summary['seed']}" if "seed" in summary else ""
    return f"[95 % interval, bootstrap over images]{over}{seed}"


def _cells(metric: m.Metric, shown_columns: list[Column]) -> list[tuple[str, str]]:
    cells = []
    for column in shown_columns:
        found = m.reading(column.values, metric)
        cells.append(
            ("\u2013", "")
            if found is None
            else (m.shown(found.value, metric), m.shown_interval(found, metric))
        )
    return cells


def _label(metric: m.Metric) -> str:
    # "words" and "nats/token" would widen the first column; the unit that matters is the per cent.
    return f"{metric.label} %" if metric.unit == "%" else metric.label
