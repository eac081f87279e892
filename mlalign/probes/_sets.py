"""Sets that a probe finds (neurons), what random sets of their size give, and block intervals.

Statistics that are no mean over records (a share, a count of neurons, an overlap of sets) get their
interval by the delete-one-block jackknife: records are dealt to blocks by their number in the probe
set, so the blocks do not depend on how records lie on ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mlalign.branching.batch import ProbeReading

BLOCKS = 8
"""Blocks of records."""

Key = tuple[str, str, int]
"""(metric, group, layer); layer -1 for all."""


class Estimate(NamedTuple):
    """A statistic of the probe set and its 95 % interval, or random sets' mean and 2.5, 97.5 %."""

    value: float
    lo: float = float("nan")
    hi: float = float("nan")
    n: int = -1
    """What it is the mean of; -1: the number that ``to_readings`` is given for all."""


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """Sorted flat indices of the ``count`` largest scores above 0; fewer where fewer are."""
    flat = np.nan_to_num(scores.ravel(), nan=0.0)
    order = np.argsort(-flat, kind="stable")[:count]
    return np.sort(order[flat[order] > 0])


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Common members / all members, of two arrays of distinct indices. NaN for two empty sets."""
    union = len(np.union1d(one, other))
    return len(np.intersect1d(one, other)) / union if union else float("nan")


@functools.cache
def random_jaccard(one: int, other: int, total: int) -> Estimate:
    """Jaccard of random sets of sizes ``one`` and ``other`` from ``total``: mean, 2.5 and 97.5 %.

    Exact: the number of common members is hypergeometric.
    """
    if one + other == 0:
        return Estimate(float("nan"))
    low, high = stats.hypergeom.ppf([0.025, 0.975], total, one, other)
    possible = np.arange(max(0, one + other - total), min(one, other) + 1)
    mean = float(
        (
            stats.hypergeom.pmf(possible, total, one, other) * possible / (one + other - possible)
        ).sum()
    )
    return Estimate(mean, float(low / (one + other - low)), float(high / (one + other - high)))


def random_mean(
    values_LF: np.ndarray, members: np.ndarray, draws: int = 200, seed: int = 0
) -> Estimate:
    """Mean of ``values`` over random sets with as many neurons of every layer as ``members``.

    ``members``: flat indices. The mean is exact; the 2.5 and 97.5 % limits come from ``draws`` sets
    (drawn with replacement). NaN for an empty set.
    """
    if not len(members):
        return Estimate(float("nan"))
    layers, neurons = values_LF.shape
    counts_L = np.bincount(members // neurons, minlength=layers)
    rng = np.random.default_rng(seed)
    sums = np.zeros(draws)
    for layer in counts_L.nonzero()[0]:
        drawn = rng.integers(0, neurons, (draws, counts_L[layer]))
        sums += values_LF[layer][drawn].sum(1)
    low, high = np.percentile(sums / len(members), [2.5, 97.5])
    mean = float((counts_L * values_LF.mean(1)).sum() / len(members))
    return Estimate(mean, float(low), float(high))


def in_blocks(items: Sequence[tuple[int, Any]]) -> dict[int, list[Any]]:
    """(number of the record, value) by block."""
    blocks: dict[int, list[Any]] = {}
    for index, value in items:
        blocks.setdefault(index % BLOCKS, []).append(value)
    return blocks


def jackknife(
    statistic: Callable[[list[Any]], dict[Key, float]], blocks: Sequence[Any]
) -> dict[Key, Estimate]:
    """``statistic`` of all blocks, with 95 % intervals from leaving out one block at a time.

    The half width is the jackknife's standard error times Student's t with (blocks - 1) degrees of
    freedom. NaN limits for a single block, and where a part of the blocks gives NaN.
    """
    whole = statistic(list(blocks))
    count = len(blocks)
    if count < 2:
        return {key: Estimate(value) for key, value in whole.items()}
    parts = [statistic([b for j, b in enumerate(blocks) if j != i]) for i in range(count)]
    student = float(stats.t.ppf(0.975, count - 1))
    made = {}
    for key, value in whole.items():
        left = np.array([part.get(key, np.nan) for part in parts])
        error = np.sqrt((count - 1) / count * np.square(left - left.mean()).sum())
        made[key] = Estimate(value, float(value - student * error), float(value + student * error))
    return made


def to_readings(
    estimates: dict[Key, Estimate],
    *,
    step: int,
    probe: str,
    side: str,
    n: int,
    noise: dict[Key, float] | None = None,
) -> list[ProbeReading]:
    """One reading over the whole set for each estimate."""
    return [
        ProbeReading(
            step=step,
            probe=probe,
            metric=metric,
            side=side,
            record="",
            layer=layer,
            group=group,
            value=float(value),
            noise=float((noise or {}).get((metric, group, layer), float("nan"))),
            lo=lo,
            hi=hi,
            n=n if count < 0 else count,
        )
        for (metric, group, layer), (value, lo, hi, count) in estimates.items()
    ]
