"""Section of the comparison: whether the neurons that moved most are the same ones in other runs.

The sets are those of probe top_drifted at each run's last pass. Of two runs,

    overlap    neurons in both sets / neurons in either                      Jaccard, 0 .. 1
    chance     the same of random sets of the same sizes, drawn from all neurons of the model:
               mean, and the middle 95 % for one pair. Exact: the number of common neurons of two
               random sets is hypergeometric

Runs of one kind differ in their seed alone, so theirs says whether a list of neurons is a finding
or an accident of the seed; pairs of two kinds say whether it belongs to the algorithm. Pairs of
different base models are left out: number 7 of one is not number 7 of the other.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from mlalign.report import neurons
from mlalign.report.beside import DASH, Rows
from mlalign.report.metrics import is_number
from mlalign.report.section import Section, render

if TYPE_CHECKING:
    from mlalign.report.compare import Trained

TITLE, ANCHOR = "Neurons that moved most, in one run and in another", "overlap"
TOTAL = "total"
"""Reading of top_drifted: how many neurons the model has."""
Set = frozenset[tuple[int, int]]
"""(layer, neuron)."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Of two runs."""

    kinds: tuple[str, str]
    value: float
    sizes: tuple[int, int]
    total: int | None
    """Neurons of the model; None where no reading says it."""


def section(found: Sequence[Trained], rows: Rows) -> Section:
    """One row per kind of run, then one per two kinds."""
    each, apart = overlaps(found, rows)
    if not each:
        why = f"fewer than two runs of one base model have a table of {neurons.PROBE}"
        return Section(id=ANCHOR, title=TITLE, empty=why)
    groups: dict[tuple[str, str], list[Overlap]] = defaultdict(list)
    for overlap in each:
        groups[overlap.kinds].append(overlap)
    order = sorted(groups, key=lambda kinds: (kinds[0] != kinds[1], kinds))
    note = (
        "Neurons in both runs' sets / neurons in either, at the last pass: mean over pairs of "
        "runs, least and largest in brackets. By chance: of random sets of the same sizes, with "
        "the middle 95 % for one pair. Within one kind runs differ in their seed: a set that "
        "chance gives as well is an accident of the seed."
    )
    note += f" {apart} pairs of different base models are left out." if apart else ""
    html = render(
        "plain.html.j2",
        kind="overlap",
        head=["runs", "pairs", "neurons in a set", "overlap", "by chance"],
        rows=[_cells(kinds, groups[kinds]) for kinds in order],
    )
    return Section(id=ANCHOR, title=TITLE, note=note, html=html)


def overlaps(found: Sequence[Trained], rows: Rows) -> tuple[list[Overlap], int]:
    """Of every two runs with a set and one base model; and how many pairs differ in the model."""
    sets = {t.label: own for t in found if (own := last_set(t.run.probe(neurons.TABLE), t.arm))}
    totals = {
        row["arm"]: int(row["value"])
        for row in rows.get(neurons.PROBE, [])
        if row["metric"] == TOTAL and is_number(row["value"])
    }
    made, apart = [], 0
    for one, other in itertools.combinations([t for t in found if t.label in sets], 2):
        if _model(one) != _model(other):
            apart += 1
            continue
        first, second = sets[one.label], sets[other.label]
        first_kind, second_kind = sorted((one.kind, other.kind))
        made.append(
            Overlap(
                kinds=(first_kind, second_kind),
                value=len(first & second) / len(first | second),
                sizes=(len(first), len(second)),
                total=totals.get(one.label, totals.get(other.label)),
            )
        )
    return made, apart


def last_set(rows: Sequence[dict[str, Any]], arm: str) -> Set:
    """The neurons of an arm's last pass that lists any."""
    own = [row for row in rows if row["arm"] == arm]
    last = max((row["step"] for row in own), default=0)
    return frozenset((row["layer"], row["neuron"]) for row in own if row["step"] == last)


def by_chance(one: int, other: int, total: int) -> tuple[float, float, float]:
    """Mean, 2.5 and 97.5 % of the Jaccard index of random sets of these sizes from ``total``."""
    common = np.arange(max(0, one + other - total), min(one, other) + 1)
    chances = stats.hypergeom.pmf(common, total, one, other)
    mean = float((chances * common / (one + other - common)).sum())
    ends = stats.hypergeom.ppf([0.025, 0.975], total, one, other)
    low, high = (float(each / (one + other - each)) for each in ends)
    return mean, low, high


def _model(t: Trained) -> str:
    return str((t.run.recipe.get("model") or {}).get("path", ""))


def _cells(kinds: tuple[str, str], group: Sequence[Overlap]) -> list[str]:
    one, other = kinds
    name = f"{one}, seed against seed" if one == other else f"{one} against {other}"
    values = [overlap.value for overlap in group]
    sizes = sorted({size for overlap in group for size in overlap.sizes})
    text = f"{np.mean(values):.3f}"
    if len(values) > 1:
        text += f" [{min(values):.3f}, {max(values):.3f}]"
    chances = [by_chance(*o.sizes, o.total) for o in group if o.total]
    chance = DASH
    if chances:
        mean, low, high = np.mean(chances, axis=0)
        chance = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    spread = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return [name, str(len(group)), spread, text, chance]
