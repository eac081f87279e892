"""What ``mlalign validate`` prints: the sample, what trains, the data, then notes and faults.

Every block is a list or a table of few columns, so that it can be read in a terminal of 60 columns.
Without colour, the tokens that carry loss stand between the marks « and ».
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlalign.validate.adapter import Group, totals
from mlalign.validate.examine import Outcome
from mlalign.validate.findings import Finding
from mlalign.validate.sample import Sample, Span

STYLES = {"prompt": "dim", "chosen": "green", "rejected": "red"}


def show(outcome: Outcome, console: Console, *, limit: int) -> None:
    """Print an outcome; ``limit``: findings of one kind that are listed, 0 for all."""
    if outcome.sample is not None:
        _heading(console, f"one pair as it is trained on: {outcome.sample.record}")
        _sample(outcome.sample, console)
    if outcome.trains:
        _heading(console, f"what trains in {outcome.model}")
        console.print(_trains(outcome.trains))
    for arm, report in outcome.reports.items():
        _heading(console, f"data of {arm}")
        console.print(_report(report))
    if outcome.memory is not None:
        _memory(outcome.memory, console)
    _listed("notes", outcome.notes, console, limit)
    _listed("faults", outcome.faults, console, limit)
    console.print()
    console.print(_verdict(outcome))


def _indented(text: Text, by: int) -> Padding:
    return Padding(text, (0, 0, 0, by), expand=False)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _sample(sample: Sample, console: Console) -> None:
    coloured = console.color_system is not None and not console.no_color
    for name, spans in (
        ("prompt", sample.prompt),
        ("chosen", sample.chosen),
        ("rejected", sample.rejected),
    ):
        loss = sum(span.tokens for span in spans if span.loss)
        said = f"{loss} tokens carry loss" if loss else "no loss"
        console.print(_indented(Text(f"{name}, {said}", style="bold " + STYLES[name]), 2))
        console.print(_indented(_text(spans, STYLES[name], coloured), 4))


def _text(spans: Sequence[Span], style: str, coloured: bool) -> Text:
    text = Text()
    for span in spans:
        shown = span.shown
        if span.loss and not coloured:
            shown = f"«{shown}»"
        text.append(shown, style=style if span.loss else STYLES["prompt"])
    return text


def _trains(groups: Sequence[Group]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("part", overflow="fold")
    for name in ("linears", "adapted", "trains", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in (*groups, totals(groups)):
        style = "" if group.trained or group.name == "total" else "dim"
        numbers = (group.modules, group.wrapped, group.trained, group.total)
        table.add_row(group.name, *(_count(number) for number in numbers), style=style)
    return table


def _report(report: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(overflow="fold", ratio=1)
    table.add_column(overflow="fold", justify="right")
    unit = report["unit"]
    table.add_row("rows, usable", f"{report['rows']:,}, {report['usable']:,}")
    for key, label in (
        ("prefix", f"{unit} of image and prompt"),
        ("chosen", f"{unit} of chosen"),
        ("rejected", f"{unit} of rejected"),
        ("edits", "runs of words that differ"),
    ):
        if report[key] is not None:
            spread = report[key]
            table.add_row(
                f"{label}: mean, median, max",
                f"{spread['mean']:.1f}, {spread['median']:g}, {spread['max']:,}",
            )
    if report["longer_chosen"] is not None:
        both = (report["longer_chosen"], report["longer_rejected"])
        table.add_row("longer side is chosen, rejected", ", ".join(f"{x:.1%}" for x in both))
    table.add_row("pairs with segments", f"{report['with_segments']:,}")
    table.add_row("pairs cut by max_length", f"{report['cut_by_max_length']:,}")
    table.add_row("images, in several pairs", f"{report['images']:,}, {report['images_shared']:,}")
    table.add_row("most pairs of one image", f"{report['most_pairs_of_an_image']:,}")
    for reason, count in report["faulty_by_reason"].items():
        table.add_row(Text(f"faulty: {reason}"), f"{count:,}")
    for reason, count in report["skipped_by_build"].items():
        table.add_row(Text(f"skipped by the build: {reason}"), f"{count:,}")
    return table


def _memory(numbers: dict[str, Any], console: Console) -> None:
    assumed = "assumed lengths" if numbers["assumed_lengths"] else "the longest pair"
    checkpointing = "with" if numbers["checkpointing"] else "without"
    _heading(console, "memory of a step on one process")
    console.print(
        f"{numbers['peak_bytes'] / 2**30:.2f} GiB at its highest, "
        f"{numbers['free_bytes'] / 2**30:.2f} GiB free here ({assumed}, {checkpointing} "
        "gradient checkpointing)",
        highlight=False,
    )


def _listed(title: str, findings: Sequence[Finding], console: Console, limit: int) -> None:
    """Findings by file and kind: the first ``limit`` of each kind, and how many more."""
    if not findings:
        return
    _heading(console, f"{title}: {len(findings)}")
    by_file: dict[str, dict[str, list[Finding]]] = {}
    for found in findings:
        by_file.setdefault(found.where, {}).setdefault(found.group, []).append(found)
    style = "red" if title == "faults" else "yellow"
    for file, kinds in by_file.items():
        console.print(_indented(Text(file, style="bold", overflow="fold"), 2))
        for found in kinds.values():
            shown = found if limit == 0 else found[:limit]
            for each in shown:
                console.print(_indented(_line(each, style), 4))
            if len(found) > len(shown):
                more = f"and {len(found) - len(shown):,} more like it: --limit 0 lists all"
                console.print(_indented(Text(more, style=style), 4))


def _line(found: Finding, style: str) -> Text:
    text = Text(overflow="fold")
    if found.row is not None:
        text.append(f"row {found.row}", style="bold")
        text.append(f" {found.record}: " if found.record else ": ")
    text.append(f"{found.key}: ", style=style)
    text.append(found.problem)
    if found.mend:
        text.append(f". {found.mend}", style="dim")
    return text


def _verdict(outcome: Outcome) -> Text:
    if not outcome.faults:
        return Text("no fault", style="bold green")
    count, away = len(outcome.faults), sum(found.absent for found in outcome.faults)
    text = Text(f"{count} fault{'s' if count > 1 else ''}", style="bold red")
    if away:
        text.append(f", {away} for want of what is not on this machine", style="red")
    return text


def _count(number: int) -> str:
    """In at most seven characters."""
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"
