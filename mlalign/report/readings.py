"""Probe readings, pooled: mean over the records of the probe set, with an interval."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlalign.report.metrics import is_number, rounded

Row = dict[str, Any]
"""Columns of ProbeReading, and ``arm``."""


@dataclass(frozen=True)
class Pooled:
    """A mean over records, weighted by how much each reading stands for."""

    mean: float
    half: float
    """Half of the 95 % interval over records (normal); NaN for fewer than two records."""
    records: int
    noise: float
    """Mean of the floor that stands beside the readings; NaN where none does."""

    @property
    def text(self) -> str:
        """Value and interval, for a hover."""
        ends = None if math.isnan(self.half) else (self.mean - self.half, self.mean + self.half)
        floor = "" if math.isnan(self.noise) else f"<br>noise floor {self.noise:.2g}"
        over = f"<br>{self.records} records" if self.records > 1 else ""
        return f"{rounded(self.mean, ends)}{over}{floor}"


@dataclass(frozen=True)
class Point:
    """A number over the whole probe set, as the probe gave it."""

    step: int
    value: float
    low: float
    high: float
    """95 % interval over records; NaN where the probe gives none."""
    noise: float
    n: int

    @property
    def text(self) -> str:
        """Value, interval, count and floor, for a hover or a cell."""
        ends = None if math.isnan(self.low) else (self.low, self.high)
        floor = "" if math.isnan(self.noise) else f"<br>noise floor {self.noise:.2g}"
        return f"{rounded(self.value, ends)}<br>n = {self.n}{floor}"


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose columns have these values, and a finite number."""
    numbers = (r for r in rows if is_number(r.get("value")))
    return [r for r in numbers if all(r[k] == v for k, v in wanted.items())]


def points(rows: Iterable[Row], metric: str, **wanted: Any) -> list[Point]:
    """The whole set's numbers of a metric, by step."""
    fixed = {"record": "", "layer": -1, "head": -1, "group": "", **wanted}
    found = {r["step"]: r for r in select(rows, metric=metric, **fixed)}
    return [point(row) for _, row in sorted(found.items())]


def point(row: Row) -> Point:
    """A reading as a point; an end of an interval that is no number is NaN."""
    low, high = _number(row.get("lo")), _number(row.get("hi"))
    known = not math.isnan(low + high)
    return Point(
        row["step"],
        row["value"],
        low if known else math.nan,
        high if known else math.nan,
        _number(row.get("noise")),
        int(row.get("n") or 0),
    )


def by_layer(rows: Iterable[Row], metric: str, **wanted: Any) -> dict[int, Pooled]:
    """Layer -> mean over the records' own readings, with its interval over records."""
    found = select(rows, metric=metric, **wanted)
    return pooled_by([r for r in found if r["record"] and r["layer"] >= 0], "layer")


def pool(rows: Iterable[Row]) -> Pooled | None:
    """One number out of readings of several records; None where there are none."""
    rows = list(rows)
    if not rows:
        return None
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for r in rows:
        weight = max(int(r.get("n") or 1), 1)
        sums[r["record"]] += weight * r["value"]
        weights[r["record"]] += weight
    total = sum(weights.values())
    mean = sum(sums.values()) / total
    half = math.nan
    if len(sums) > 1:
        # Variance of a ratio of sums over records: a record with several words counts as one.
        k = len(sums)
        residuals = [(sums[r] - mean * weights[r]) * k / total for r in sums]
        half = 1.96 * math.sqrt(sum(d * d for d in residuals) / (k - 1) / k)
    floors = [r["noise"] for r in rows if is_number(r.get("noise"))]
    noise = sum(floors) / len(floors) if floors else math.nan
    return Pooled(mean, half, len(sums), noise)


def pooled_by(rows: Iterable[Row], *keys: str) -> dict[Any, Pooled]:
    """``pool`` for every value of the columns ``keys`` (a tuple where there are several)."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for r in rows:
        groups[r[keys[0]] if len(keys) == 1 else tuple(r[k] for k in keys)].append(r)
    found = {key: pool(group) for key, group in groups.items()}
    return {key: value for key, value in sorted(found.items()) if value is not None}


def _number(value: Any) -> float:
    return float(value) if is_number(value) else math.nan
