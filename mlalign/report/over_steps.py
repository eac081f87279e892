"""What rewards and held-out images did over the steps.

``python -m mlalign.report.over_steps RUN [RUN ...]``: runs that were watched
(``train.algorithm.watch_every``), of several systems and seeds; a system is what runs share whose
names differ only in a number at the end. A row is a step: mean over seeds, and the least and
largest seed, of what the watch saw on held-out images. The reward is the mean over the optimiser
steps since the row before, in each system's own scale: rewards of two systems compare only where
they are the same.

Behind the table, for each two systems: the first watched step at which the one's CHAIR_i, mean over
seeds, is at or below the other's last, against the first step at which the other itself is there.
CHAIR_i of some images at some steps is noisy, so a step or two apart says little.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlalign.report.metrics import is_number
from mlalign.report.systems import SystemsError, labels
from mlalign.runlog import read_lines

WATCH = "watch/"
RANKED = "halluc/chair_i"
REWARD = "reward"
COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    (REWARD, "reward", 1, 2),
    (WATCH + RANKED, "CHAIR_i %", 100, 1),
    (WATCH + "halluc/recall", "recall %", 100, 1),
    (WATCH + "halluc/length", "words", 1, 1),
    (WATCH + "lm/clean_caption_nll", "clean NLL", 1, 3),
)
"""Key, column, factor, digits."""

Curve = dict[int, dict[str, float]]
"""Step -> key -> number."""


def curve(rows: Iterable[dict[str, Any]]) -> Curve:
    """One run's watched steps, from the rows of its metrics.jsonl."""
    made: Curve = {}
    rewards: list[float] = []
    watched = [row for row in rows if is_number(row.get("step"))]
    # A step's reward is logged before or after the look at the same step: steps decide.
    for row in sorted(watched, key=lambda row: (row["step"], WATCH + RANKED in row)):
        if is_number(row.get(REWARD)):
            rewards.append(float(row[REWARD]))
        if WATCH + RANKED in row:
            seen = {k: float(v) for k, v in row.items() if k.startswith(WATCH) and is_number(v)}
            made[int(row["step"])] = seen | ({REWARD: float(np.mean(rewards))} if rewards else {})
            rewards = []
    return made


def curves(runs: Sequence[Path]) -> dict[str, list[Curve]]:
    """System -> the curves of its seeds. Raises SystemsError for a run that was not watched."""
    found: dict[str, list[Curve]] = defaultdict(list)
    for run in runs:
        rows = read_lines(run / "metrics.jsonl")
        for arm, label, _ in labels(run):
            own = curve(row for row in rows if row.get("arm") == arm)
            if not own:
                raise SystemsError(
                    f"{run}: no watched step of {arm!r}. Set train.algorithm.watch_every in its "
                    "recipe and train it"
                )
            found[label].append(own)
    return dict(found)


def over_seeds(seeds: Sequence[Curve], key: str) -> dict[int, list[float]]:
    """Step -> the key's number of each seed, for the steps that every seed has."""
    steps = set.intersection(*(set(each) for each in seeds))
    return {
        step: values
        for step in sorted(steps)
        if len(values := [c[step][key] for c in seeds if key in c[step]]) == len(seeds)
    }


def reached(seeds: Sequence[Curve], level: float) -> int | None:
    """First watched step at which the mean CHAIR_i is at most ``level``; None: never."""
    means = {s: float(np.mean(v)) for s, v in over_seeds(seeds, WATCH + RANKED).items()}
    return next((step for step, value in means.items() if value <= level), None)


def table(runs: Sequence[str | Path]) -> str:
    """Markdown. Raises SystemsError as ``curves`` does."""
    found = curves([Path(run) for run in runs])
    head = ["step", "system", *(name for _, name, _, _ in COLUMNS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    cells = {
        (label, key): over_seeds(seeds, key)
        for label, seeds in found.items()
        for key, *_ in COLUMNS
    }
    for step in sorted({step for each in cells.values() for step in each}):
        for label in found:
            row = [
                _range(cells[label, key].get(step, []), factor, digits)
                for key, _, factor, digits in COLUMNS
            ]
            if any(row):
                lines.append("| " + " | ".join([str(step), label, *row]) + " |")
    return "\n".join([*lines, "", *_races(found)])


def _races(found: dict[str, list[Curve]]) -> list[str]:
    lines = []
    for label, seeds in found.items():
        means = over_seeds(seeds, WATCH + RANKED)
        level = float(np.mean(means[max(means)]))
        own = reached(seeds, level)
        for other in (name for name in found if name != label):
            step = reached(found[other], level)
            came = f"reaches it at step {step}" if step is not None else "does not reach it"
            lines.append(
                f"- {label} ends at a CHAIR_i of {100 * level:.1f} %, where it first is at step "
                f"{own}; {other} {came}."
            )
    return lines


def _range(values: Sequence[float], factor: float, digits: int) -> str:
    if not values:
        return ""
    scaled = [factor * value for value in values]
    mean = f"{np.mean(scaled):.{digits}f}"
    if len(scaled) < 2:
        return mean
    return f"{mean} [{min(scaled):.{digits}f}, {max(scaled):.{digits}f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of the run folders named; status 2 with one message where that cannot be."""
    folders = list(sys.argv[1:] if argv is None else argv)
    try:
        if not folders:
            raise SystemsError("name run folders: python -m mlalign.report.over_steps runs/*-0 ...")
        print(table(folders))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
