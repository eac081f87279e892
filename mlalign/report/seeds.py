"""One table over several runs of one recipe: mean and spread over seeds, before and after.

Each run is one seed; rows are metrics, columns the base and every arm, cells ``mean +- standard
deviation over seeds``. A run on blank images (the control) gives columns of its own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mlalign.report.metrics import METRICS
from mlalign.runlog import read_lines

RELIANCE = {
    "reliance, blank (nats/token)": "probe/image_reliance/blank_per_token/chosen",
    "reliance, swapped (nats/token)": "probe/image_reliance/swapped_per_token/chosen",
}
"""Log-prob of the true captions with the image minus without it, from the last pass."""


def table(runs: Sequence[str | Path]) -> str:
    """The Markdown table. Raises FileNotFoundError for a run without summary.json."""
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in map(Path, runs):
        _collect(run, cells)
    columns = list(dict.fromkeys(c for row in cells.values() for c in row))
    columns.sort(key=lambda c: (c != "base", c.endswith("blind"), c))
    labels = {m.key: m for m in METRICS}
    lines = [
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for key in [*(k for k in labels if k in cells), *(k for k in RELIANCE if k in cells)]:
        metric = labels.get(key)
        scale, digits = (metric.scale, metric.digits) if metric else (1.0, 3)
        name = f"{metric.label} {metric.unit}".strip() if metric else key
        shown = [_cell(cells[key].get(column, []), scale, digits) for column in columns]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _collect(run: Path, cells: dict[str, dict[str, list[float]]]) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    blind = _is_blind(run)
    for number, (arm, sides) in enumerate(summary["builders"].items()):
        column = f"{arm}, blind" if blind else arm
        for key, value in sides["after"].items():
            _add(cells[key][column], value)
        if number == 0 and not blind:
            for key, value in sides["before"].items():
                _add(cells[key]["base"], value)
    if not blind:
        _collect_reliance(run, cells)


def _collect_reliance(run: Path, cells: dict[str, dict[str, list[float]]]) -> None:
    """Reliance after training, by arm; its base side is the same for every arm."""
    rows = read_lines(run / "metrics.jsonl")
    base_seen = False
    for arm in dict.fromkeys(row["arm"] for row in rows):
        passes = [r for r in rows if r["arm"] == arm and next(iter(RELIANCE.values())) in r]
        if not passes:
            continue
        for label, key in RELIANCE.items():
            _add(cells[label][arm], passes[-1].get(key))
            if not base_seen:
                _add(cells[label]["base"], passes[-1].get(f"{key}/base"))
        base_seen = True


def _is_blind(run: Path) -> bool:
    from mlalign.recipe import load

    return load(run / "recipe.yaml").train.blank_images


def _add(values: list[float], value: Any) -> None:
    if isinstance(value, (int, float)):
        values.append(float(value))


def _cell(values: list[float], scale: float, digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{spread}"
