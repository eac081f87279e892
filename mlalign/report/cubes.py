"""Readings of the whole set as arrays: passes by layers by heads. Read in columns, not row by row.

A pass over 32 layers of 32 heads leaves some sixty thousand readings; twenty passes as dicts would
take minutes and gigabytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mlalign.report.folder import READING, Run

PARTS = ("value", "lo", "hi", "noise")
SIDES = ("base", "adapted", "delta")

Key = tuple[str, str, str, str]
"""Arm, probe, metric, group."""
Arrays = dict[str, np.ndarray]
"""Column -> one value per reading."""


@dataclass(frozen=True)
class Cube:
    """One metric and token group of one probe and arm."""

    arm: str
    probe: str
    metric: str
    group: str
    steps: list[int]
    shape: tuple[int, int]
    """Layers and heads; one head where the reading is over all heads."""
    sides: dict[str, dict[str, np.ndarray]]
    """Side -> part of PARTS -> (passes, layers, heads); NaN in holes."""

    @property
    def name(self) -> str:
        """Metric and group."""
        return f"{self.metric}, {self.group}" if self.group else self.metric

    def thinned(self, keep: Iterable[int]) -> Cube:
        """Only the passes at these steps."""
        wanted = set(keep)
        picked = [i for i, step in enumerate(self.steps) if step in wanted]
        sides = {
            side: {part: values[picked] for part, values in parts.items()}
            for side, parts in self.sides.items()
        }
        steps = [self.steps[i] for i in picked]
        return Cube(self.arm, self.probe, self.metric, self.group, steps, self.shape, sides)


@dataclass(frozen=True)
class Whole:
    """Every reading over the whole set, of all probes, arms and passes."""

    numbers: dict[str, list[dict[str, Any]]]
    """Probe -> readings over all layers and heads, a dict per reading."""
    layers: tuple[Cube, ...]
    """What is read by layer, over all heads."""
    heads: tuple[Cube, ...]
    """What is read by layer and head."""


@lru_cache(maxsize=2)
def whole(run: Run) -> Whole:
    """Read every table of readings once."""
    numbers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    parts: dict[bool, dict[Key, list[tuple[int, str, Arrays]]]]
    parts = {heads: defaultdict(list) for heads in (False, True)}
    for table in run.reading_tables:
        rows = table.table(record="")
        columns = _columns(rows)
        scalar = (columns["layer"] < 0) & (columns["head"] < 0) & (columns["neuron"] < 0)
        found = rows.take(np.flatnonzero(scalar)).to_pylist()
        numbers[table.probe] += [{**READING, **row, "arm": table.arm} for row in found]
        layered = (columns["layer"] >= 0) & (columns["neuron"] < 0)
        for heads, by_key in parts.items():
            at = layered & ((columns["head"] >= 0) == heads)
            for (metric, group, side), picked in _split(columns, at):
                key = (table.arm, table.probe, metric, group)
                by_key[key].append((table.step, side, picked))
    cubes = {h: tuple(_cube(key, each) for key, each in by.items()) for h, by in parts.items()}
    return Whole(dict(numbers), cubes[False], cubes[True])


def _columns(rows: Any) -> dict[str, Any]:
    """Columns of readings: numbers as they are, words as codes and a list."""
    columns: dict[str, Any] = {}
    for name in ("layer", "head", "neuron", *PARTS):
        if name in rows.column_names:
            columns[name] = rows[name].to_numpy()
        else:
            columns[name] = np.full(rows.num_rows, READING[name])
    for name in ("metric", "group", "side"):
        if name not in rows.column_names:
            columns[name] = (np.zeros(rows.num_rows, dtype=np.int64), [READING.get(name, "")])
            continue
        coded = rows[name].cast("string").combine_chunks().dictionary_encode()
        columns[name] = (coded.indices.to_numpy(), coded.dictionary.to_pylist())
    return columns


def _split(columns: dict[str, Any], at: np.ndarray) -> Iterable[tuple[tuple[str, ...], Arrays]]:
    """The readings at ``at`` by metric, group and side."""
    codes, words = zip(*(columns[name] for name in ("metric", "group", "side")), strict=True)
    joined = np.zeros(len(at), dtype=np.int64)
    for code, known in zip(codes, words, strict=True):
        joined = joined * max(len(known), 1) + code
    for one in dict.fromkeys(joined[at].tolist()):
        rows = np.flatnonzero(at & (joined == one))
        key = tuple(w[c[rows[0]]] for c, w in zip(codes, words, strict=True))
        yield key, {name: columns[name][rows] for name in ("layer", "head", *PARTS)}


def _cube(key: Key, found: list[tuple[int, str, Arrays]]) -> Cube:
    steps = sorted({step for step, _, _ in found})
    layers = 1 + max(int(a["layer"].max()) for _, _, a in found)
    heads = 1 + max(0, max(int(a["head"].max()) for _, _, a in found))
    sides: dict[str, dict[str, np.ndarray]] = {}
    for step, side, arrays in found:
        parts = sides.setdefault(
            side, {part: np.full((len(steps), layers, heads), np.nan) for part in PARTS}
        )
        at = (steps.index(step), arrays["layer"], np.maximum(arrays["head"], 0))
        for part in PARTS:
            parts[part][at] = arrays[part]
    ordered = {side: sides[side] for side in SIDES if side in sides}
    return Cube(*key, steps, (layers, heads), ordered | sides)
