"""What each algorithm did inside, and whether it went with the fall in hallucination.

``python -m mlalign.report.inside runs/*-microworld-*``: runs of one world, evaluated alike, with
probe readings of their result: those of ``mlalign probe RUN`` (arms ``<arm>.probed``) where they
are there, else the last of training.

First table, by system: readings of the result minus those of the base (drift has no base: it is
the change itself), mean over seeds, and the least and largest seed.

Second table, over the runs: Spearman's rank correlation of each reading's change with the fall of
CHAIR_i. "between systems": over the systems' means, with a 95 % interval by resampling systems.
"over seeds": over all runs after each system's own mean is taken off both numbers, with an
interval by resampling runs. With six systems and three seeds these intervals are wide, and no
correction is made for the number of readings: a correlation here is a question, not an answer.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mlalign.report.metrics import is_number
from mlalign.report.systems import BASE, RANKED, SystemsError, collect, labels
from mlalign.runlog import read_lines

READINGS: tuple[tuple[str, str], ...] = (
    ("probe/image_reliance/blank_per_token/chosen", "reliance, blank"),
    ("probe/image_reliance/swapped_per_token/chosen", "reliance, swapped"),
    ("probe/vcd_gap/gap_per_token/chosen", "gap, noised"),
    ("probe/attention_knockout/drop_all_per_token/chosen", "drop, image columns hidden"),
    ("grounding/image_mass/response", "attention on image"),
    ("grounding/box_lift/real", "grounding lift"),
    ("probe/lens_confidence/auroc", "lens, real against absent"),
    ("drift/rms/response", "drift, response"),
    ("drift/rms/image", "drift, image"),
    ("drift/lora_norm", "update norm"),
)
"""Scalars of metrics.jsonl and what they are called; those of no run are left out."""
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One arm of one run."""

    system: str
    fall: float
    """Of CHAIR_i, in points."""
    changes: dict[str, float]
    """Reading -> after minus base."""


def table(runs: Sequence[str | Path]) -> str:
    """Both tables in Markdown. Raises SystemsError as ``systems.table`` does, and where no run has
    a reading."""
    found = outcomes([Path(run) for run in runs])
    keys = [(key, name) for key, name in READINGS if any(key in o.changes for o in found)]
    if not keys:
        raise SystemsError(f"{runs[0]}: no probe readings. Run `mlalign probe` on these runs")
    return "\n".join([*_by_system(found, keys), "", *_correlations(found, keys)])


def outcomes(runs: Sequence[Path]) -> list[Outcome]:
    """What each arm of each run came to."""
    systems = collect(runs)
    found = []
    for run in runs:
        rows = read_lines(run / "metrics.jsonl")
        for arm, label, seed in labels(run):
            before, after = systems[BASE].values[RANKED][seed], systems[label].values[RANKED][seed]
            own = [row for row in rows if row.get("arm") == f"{arm}.probed"] or [
                row for row in rows if row.get("arm") == arm
            ]
            changes = {
                key: value for key, _ in READINGS if (value := _change(own, key)) is not None
            }
            found.append(Outcome(system=label, fall=100 * (before - after), changes=changes))
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; NaN for fewer than three, or where either side does not vary."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return float("nan")
    found: Any = stats.spearmanr(x, y)
    return float(found.statistic)


def interval(x: Sequence[float], y: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap over the points; NaN where most draws give no correlation."""
    rng = np.random.default_rng(seed)
    pairs = np.column_stack([x, y])
    drawn = [
        spearman(*pairs[rng.integers(0, len(pairs), len(pairs))].T.tolist())
        for _ in range(RESAMPLES)
    ]
    kept = [value for value in drawn if value == value]
    if len(kept) < RESAMPLES / 2:
        return float("nan"), float("nan")
    low, high = np.percentile(kept, [2.5, 97.5])
    return float(low), float(high)


def _change(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    last = next((row for row in reversed(rows) if is_number(row.get(key))), None)
    if last is None:
        return None
    base = last.get(f"{key}/base")
    return float(last[key]) - (float(base) if is_number(base) else 0.0)


def _by_system(found: Sequence[Outcome], keys: Sequence[tuple[str, str]]) -> list[str]:
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in found:
        groups[outcome.system].append(outcome)
    order = sorted(groups, key=lambda name: -np.mean([o.fall for o in groups[name]]))
    head = ["system", "CHAIR_i, fall in points", *(name for _, name in keys)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in order:
        cells = [_range([o.fall for o in groups[name]], 1)]
        for key, _ in keys:
            values = [o.changes[key] for o in groups[name] if key in o.changes]
            cells.append(_range(values, 3) if values else "")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def _range(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):+.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} [{min(values):+.{digits}f}, {max(values):+.{digits}f}]"


def _correlations(found: Sequence[Outcome], keys: Sequence[tuple[str, str]]) -> list[str]:
    head = ["reading", "runs", "between systems", "over seeds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key, name in keys:
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for outcome in found:
            if key in outcome.changes:
                points[outcome.system].append((outcome.changes[key], outcome.fall))
        means = {system: np.mean(own, axis=0) for system, own in points.items()}
        apart = [
            np.subtract(each, means[system]).tolist()
            for system, own in points.items()
            if len(own) > 1
            for each in own
        ]
        cells = [_cell([m.tolist() for m in means.values()]), _cell(apart)]
        runs = str(sum(map(len, points.values())))
        lines.append("| " + " | ".join([name, runs, *cells]) + " |")
    return lines


def _cell(points: Sequence[Sequence[float]]) -> str:
    if len(points) < 3:
        return "too few"
    x, y = zip(*points, strict=True)
    rho = spearman(x, y)
    if rho != rho:
        return "does not vary"
    low, high = interval(x, y)
    return f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of the run folders named; status 2 with one message where that cannot be."""
    folders = list(sys.argv[1:] if argv is None else argv)
    try:
        print(table(folders))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
