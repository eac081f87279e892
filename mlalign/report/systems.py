"""One table over systems and seeds, ranked: ``python -m mlalign.report.systems runs/*-photos-*``.

A system is what runs share whose names differ only in a number at the end; where a run trained
several arms each is a system of its own, and so is the control on blank images. Cells are means
over seeds with the 95 % t interval of that mean (rates cut at 0 and 100 %); of a single seed the
run's own bootstrap interval over images.

The rank is by mean CHAIR_i after training. Behind it stand the ranks that the seeds allow: a
system is clearly below another where the 95 % t interval of their difference, seed by seed over
the seeds that both have, lies below zero. So it needs two common seeds at least, and no correction
is made for the number of comparisons. Not here: which change is more than chance in one run; that
is ``change`` in its summary.json.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

from mlalign.recipe import Recipe, load
from mlalign.report.metrics import BY_KEY, Metric, is_number, reading
from mlalign.runlog import read_lines

RANKED = "halluc/chair_i"
SCORES: tuple[tuple[str, str], ...] = (
    (RANKED, "CHAIR_i %"),
    ("halluc/recall", "recall %"),
    ("halluc/length", "words"),
    ("lm/clean_caption_nll", "clean NLL"),
    ("pope/accuracy", "POPE acc. %"),
    ("pope/yes_rate", "yes rate %"),
)
"""Keys of summary.json and what their columns are called."""
PROBES: tuple[tuple[str, str], ...] = (
    ("probe/image_reliance/blank_per_token/chosen", "image reliance"),
    ("grounding/box_lift/real", "grounding lift"),
)
"""Scalars of metrics.jsonl: nats per token that the image is worth, and attention inside the
object's box against chance. Their base side stands under ``<key>/base``."""
BASE = "base"

Interval = tuple[float, float]


class SystemsError(ValueError):
    """Runs that cannot stand in one table. The message names the run, the key and the mend."""


@dataclass
class System:
    """What the seeds of one system gave: key -> seed -> number, and its bootstrap interval."""

    label: str
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    intervals: dict[str, dict[int, Interval]] = field(default_factory=dict)

    def add(self, key: str, seed: int, value: Any, interval: Any = None) -> None:
        """Keep one seed's number; what is no number is left out."""
        if not is_number(value):
            return
        self.values.setdefault(key, {})[seed] = float(value)
        if interval is not None:
            self.intervals.setdefault(key, {})[seed] = interval

    def seeds(self) -> list[int]:
        """The seeds that the ranked number is there for."""
        return sorted(self.values.get(RANKED, {}))

    def mean(self, key: str) -> float | None:
        """Over the seeds; None where no run has it."""
        values = self.values.get(key)
        return mean(values.values()) if values else None

    def interval(self, key: str) -> Interval | None:
        """Of the mean over seeds; of one seed, over its images."""
        values = self.values.get(key, {})
        if len(values) == 1:
            return self.intervals.get(key, {}).get(next(iter(values)))
        return t_interval(list(values.values())) if values else None


def t_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of at least two values."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def table(runs: Sequence[str | Path]) -> str:
    """The Markdown table. Raises SystemsError, and FileNotFoundError for a run that is not done."""
    systems = collect([Path(run) for run in runs])
    base = systems.pop(BASE)
    found = ranks(list(systems.values()))
    order = sorted(systems.values(), key=lambda s: found[s.label][0])
    probes = [(key, name) for key, name in PROBES if any(key in s.values for s in order)]
    names = [*(name for _, name in SCORES), *(f"{name}, before and after" for _, name in probes)]
    lines = ["| rank | system | seeds | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 3) + "|")
    empty = [""] * len(probes)
    cells = [_cell(base, key, BY_KEY[key]) for key, _ in SCORES]
    lines.append(_line(["", BASE, str(len(base.seeds())), *cells, *empty]))
    for system in order:
        place, best, worst = found[system.label]
        cells = [_cell(system, key, BY_KEY[key]) for key, _ in SCORES]
        cells += [_before_after(system, key) for key, _ in probes]
        rank = f"{place} ({best} to {worst})" if best < worst else str(place)
        lines.append(_line([rank, system.label, str(len(system.seeds())), *cells]))
    return "\n".join(lines)


def ranks(systems: Sequence[System]) -> dict[str, tuple[int, int, int]]:
    """Rank by mean CHAIR_i, and the best and worst rank that the seeds allow, by label."""
    order = sorted(systems, key=lambda s: mean(s.values[RANKED].values()))
    found = {}
    for place, system in enumerate(order, start=1):
        below = sum(clearly_below(other, system) for other in order)
        above = sum(clearly_below(system, other) for other in order)
        found[system.label] = (place, 1 + below, len(order) - above)
    return found


def clearly_below(one: System, other: System) -> bool:
    """Whether the paired interval of one minus other, over common seeds, lies below zero."""
    ours, theirs = one.values[RANKED], other.values[RANKED]
    apart = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return len(apart) > 1 and t_interval(apart)[1] < 0


def collect(runs: Sequence[Path]) -> dict[str, System]:
    """Systems by label, the base among them. Raises SystemsError."""
    if not runs:
        raise SystemsError("no run folder was given: name those of one world, e.g. runs/a-0")
    systems = {BASE: System(BASE)}
    first: tuple[Path, dict[str, Any]] | None = None
    for run in runs:
        recipe = load(run / "recipe.yaml")
        setting = _setting(recipe)
        first = first or (run, setting)
        differs = [key for key, value in setting.items() if first[1][key] != value]
        if differs:
            raise SystemsError(
                f"{run} and {first[0]} differ in {', '.join(differs)}, so their numbers cannot be "
                "ranked together. Give runs of one world, evaluated alike"
            )
        _add_run(run, recipe, systems)
    if len(systems) == 1:
        raise SystemsError(f"{runs[0]}: summary.json holds no arm. Run `mlalign eval` on it")
    return systems


def _setting(recipe: Recipe) -> dict[str, Any]:
    """What has to be the same for numbers to be compared."""
    whole = recipe.model_dump(mode="json")
    return {
        "model.path": whole["model"]["path"],
        "model.image": whole["model"]["image"],
        "data.source": whole["data"]["source"],
        "data.vocabulary": whole["data"]["vocabulary"],
        "eval": {k: v for k, v in whole["eval"].items() if k != "batch_size"},
    }


def _add_run(run: Path, recipe: Recipe, systems: dict[str, System]) -> None:
    arms = json.loads((run / "summary.json").read_text(encoding="utf-8"))["builders"]
    rows = read_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    for arm, label, seed in labels(run, recipe):
        sides = arms[arm]
        system = systems.setdefault(label, System(label))
        if seed in system.seeds():
            raise SystemsError(f"{run}: {label} has seed {seed} twice. Leave one of the runs out")
        if not is_number(sides["after"].get(RANKED)):
            raise SystemsError(f"{run}: {arm} has no {RANKED}. Add chair to eval.benchmarks")
        for key, _ in SCORES:
            for target, side in ((system, "after"), (systems[BASE], "before")):
                found = reading(sides[side], BY_KEY[key])
                # In stored units; ``_cell`` scales.
                bounds = sides[side].get(f"{key}_ci95") if found and found.interval else None
                target.add(key, seed, sides[side].get(key), bounds and tuple(bounds))
        of_arm = [row for row in rows if row.get("arm") == arm]
        for key, _ in PROBES:
            last = next((row for row in reversed(of_arm) if is_number(row.get(key))), {})
            system.add(key, seed, last.get(key))
            system.add(f"{key}/base", seed, last.get(f"{key}/base"))


def labels(run: Path, recipe: Recipe | None = None) -> list[tuple[str, str, int]]:
    """(arm, label of its system, seed) of every arm that a run has a summary of."""
    recipe = recipe or load(run / "recipe.yaml")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    name = re.sub(r"-\d+(?=$|-blind$)", "", recipe.name).removesuffix("-blind")
    blind = ", blind" if recipe.train.blank_images else ""
    arms = summary["builders"]
    return [
        (arm, (f"{name}/{arm}" if len(arms) > 1 else name) + blind, summary["seed"]) for arm in arms
    ]


def _cell(system: System, key: str, metric: Metric) -> str:
    value = system.mean(key)
    if value is None:
        return ""
    text = f"{metric.scale * value:.{metric.digits}f}"
    bounds = system.interval(key)
    if bounds is None:
        return text
    low, high = (metric.scale * bound for bound in bounds)
    if metric.unit == "%":
        low, high = max(low, 0.0), min(high, 100.0)
    return f"{text} [{low:.{metric.digits}f}, {high:.{metric.digits}f}]"


def _before_after(system: System, key: str) -> str:
    sides = [system.mean(f"{key}/base"), system.mean(key)]
    if sides[1] is None:
        return ""
    text = ", ".join("?" if side is None else f"{side:.2f}" for side in sides)
    bounds = system.interval(key)
    return text if bounds is None else f"{text} [{bounds[0]:.2f}, {bounds[1]:.2f}]"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of the run folders named; status 2 with one message where that cannot be."""
    folders = list(sys.argv[1:] if argv is None else argv)
    try:
        print(table(folders))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
