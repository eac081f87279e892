"""One page that sets several runs side by side: hallucination, and the same probes for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mlalign.report import beside, overlaps, page, series
from mlalign.report import figures as fg
from mlalign.report import metrics as m
from mlalign.report.cubes import whole
from mlalign.report.folder import Run
from mlalign.report.section import Group, Section, render
from mlalign.store import write_text_atomic

SCORES = (
    "halluc/chair_i",
    "halluc/chair_s",
    "halluc/recall",
    "halluc/length",
    "pope/accuracy",
    "pope/yes_rate",
    "lm/clean_caption_nll",
)
"""What of summary.json stands beside the probes: a rate never without recall, length and loss."""
HINT = "A click on a heading sorts."


class CompareError(ValueError):
    """Runs that cannot stand on one page. The message names the run and the mend."""


@dataclass(frozen=True)
class Trained:
    """One arm of one run."""

    label: str
    run: Run
    arm: str
    kind: str
    """The label without the number of a seed at its end."""
    colour: int
    """The same for runs of one kind."""

    @property
    def sides(self) -> dict[str, Any]:
        """Before, after and change of summary.json; empty where the run was not evaluated."""
        return self.run.summary.get("builders", {}).get(self.arm, {})

    @property
    def css(self) -> str:
        """The colour itself."""
        return fg.colour(self.colour)


def write(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the page; returns its path.

    Raises NoRunFolder for a folder that is not there, CompareError for no ``out``, for fewer than
    two runs, for one that is given twice, and for one without anything trained.
    """
    if out is None:
        raise CompareError("several runs: say where the page goes, --out FILE.html")
    write_text_atomic(Path(out), html([Run(Path(folder)) for folder in folders]))
    return Path(out)


def html(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    if len(runs) < 2:
        raise CompareError("a comparison needs at least two run folders")
    found = trained(runs)
    figures = fg.Figures()
    rows = numbers(found)
    sections = [
        _scores(found),
        beside.table(found, rows),
        beside.over_steps(found, rows, figures),
        beside.against(found, rows, figures),
        overlaps.section(found, rows),
        _every(found, rows, figures),
        _runs(found),
    ]
    return page.whole_page(
        heading=f"mlalign \u00b7 {len(runs)} runs side by side",
        headline=", ".join(dict.fromkeys(t.label for t in found)),
        banners=differences(runs),
        sections=sections,
    )


def trained(runs: Sequence[Run]) -> list[Trained]:
    """Every arm of every run, under the run's name where it has one arm."""
    folders = [run.folder.resolve() for run in runs]
    names = [folder.name for folder in folders]
    found: list[tuple[str, Run, str]] = []
    for folder, run in zip(folders, runs, strict=True):
        if folders.count(folder) > 1:
            raise CompareError(f"{run.folder} is given twice: give each run once")
        name = (
            folder.name if names.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}"
        )
        if not run.arms:
            raise CompareError(f"{run.folder} has nothing trained: leave it out, or train it")
        found += [(name if len(run.arms) == 1 else f"{name} {arm}", run, arm) for arm in run.arms]
    kinds = list(dict.fromkeys(_kind(label) for label, _, _ in found))
    return [
        Trained(label, run, arm, _kind(label), kinds.index(_kind(label)))
        for label, run, arm in found
    ]


def _kind(label: str) -> str:
    name, _, arm = label.partition(" ")
    return f"{re.sub(r'[-_.]?(s|seed)?[-_.]?[0-9]+$', '', name) or name} {arm}".strip()


def numbers(found: Sequence[Trained]) -> dict[str, list[dict[str, Any]]]:
    """Probe -> readings over the whole set, ``arm`` being the label."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        for probe, read in whole(one.run).numbers.items():
            mine = [{**row, "arm": one.label} for row in read if row["arm"] == one.arm]
            rows.setdefault(probe, []).extend(mine)
    return rows


def differences(runs: Sequence[Run]) -> list[str]:
    """What keeps the runs from being compared number by number, a sentence each."""
    first, said = runs[0], []
    for what, of, mend in (
        ("base model", _model, "their levels are of other models; compare changes alone"),
        ("probe set", lambda run: sorted(run.probe_set), "probes read other records"),
        ("held-out examples", lambda run: sorted(run.heldout), "scores are over other images"),
    ):
        other = [run.folder.name for run in runs if of(run) != of(first)]
        if other:
            names = ", ".join(other)
            said.append(f"Not the same {what} as {first.folder.name}: {names}. So {mend}.")
    return said


def _model(run: Run) -> str:
    return str((run.recipe.get("model") or {}).get("path", ""))


def _scores(found: Sequence[Trained]) -> Section:
    """Rows are what was trained, columns the scores after training and their change."""
    title, anchor = "Hallucination", "scores"
    present = [
        m.BY_KEY[key]
        for key in SCORES
        if any(m.reading(t.sides.get("after") or {}, m.BY_KEY[key]) for t in found)
    ]
    if not present:
        return Section(id=anchor, title=title, empty="none of the runs was evaluated")
    groups = [
        {
            "name": metric.label + (" %" if metric.unit == "%" else ""),
            "help": metric.help,
            "heads": ["before", "after", "change"],
        }
        for metric in present
    ]
    rows = [
        {
            "label": t.label,
            "colour": t.css,
            "cells": [cell for metric in present for cell in _score_cells(t, metric)],
        }
        for t in found
    ]
    note = (
        "95 % intervals over images in brackets. A change is bold where it is more than chance; "
        f"green is better, red worse. {HINT}"
    )
    html = render("beside.html.j2", groups=groups, rows=rows)
    return Section(id=anchor, title=title, note=note, html=html)


def _score_cells(t: Trained, metric: m.Metric) -> list[dict[str, Any]]:
    cells = []
    for side in ("before", "after"):
        found = m.reading(t.sides.get(side) or {}, metric)
        cells.append(
            beside.cell("\u2013")
            if found is None
            else beside.cell(
                m.shown(found.value, metric), m.shown_interval(found, metric), found.value
            )
        )
    moved = m.change(t.sides, metric)
    if moved is None:
        return [*cells, beside.cell("\u2013")]
    tone = ""
    if m.is_clear(t.sides, metric):
        better = (moved.value < 0) == (metric.better == "lower")
        tone = "clear" + ("" if metric.better == "none" else " good" if better else " bad")
    text = m.signed(moved.value, metric.digits)
    return [*cells, beside.cell(text, m.shown_interval(moved, metric), moved.value, tone)]


def _every(found: Sequence[Trained], rows: dict[str, Any], figures: fg.Figures) -> Section:
    """One tab per probe: every number of the set for every run."""
    labels = [t.label for t in found]
    groups = []
    for probe, read in rows.items():
        entries = series.entries(read)
        if entries:
            first, _ = series.description(probe)
            html = Markup('<p class="note">{}</p>').format(first)
            colours = [t.colour for t in found]
            html += series.chart(figures, entries, labels, probe, colours)
            groups.append(Group(name=probe.replace("_", " "), html=html))
    empty = "" if groups else "none of the runs was probed"
    return Section(id="every", title="Every number", groups=tuple(groups), empty=empty)


def _runs(found: Sequence[Trained]) -> Section:
    """What each was."""
    head = ["run", "model", "objective", "steps", "seed", "records probed", "images evaluated"]
    rows = []
    for t in found:
        train = t.run.recipe.get("train") or {}
        cells = [
            t.label,
            _model(t.run),
            page.name_of(train.get("objective")),
            max(
                (row["step"] for row in t.run.metrics if row.get("arm") == t.arm), default="\u2013"
            ),
            t.run.recipe.get("seed", "\u2013"),
            len(t.run.probe_set) or "\u2013",
            len(t.run.heldout) or "\u2013",
        ]
        rows.append([str(cell) for cell in cells])
    html = render("plain.html.j2", kind="runs", head=head, rows=rows)
    return Section(id="runs", title="The runs", html=html)
