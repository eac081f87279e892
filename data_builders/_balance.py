"""Length balance: drop the pairs whose rejected side is longest for its chosen one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

STEPS = 51
"""Ratios tried: 0 to 1 in steps of 0.02."""


def keeps(chosen: int, rejected: int, ratio: float) -> bool:
    """Whether a pair with these lengths stays: (rejected - chosen) / rejected <= ratio."""
    return (rejected - chosen) <= ratio * rejected + 1e-9


def best_ratio(lengths: Iterable[tuple[int, int]]) -> float:
    """The ratio that makes the mean of (chosen - rejected) over the kept pairs smallest in size.

    ``lengths``: (chosen, rejected) of each pair, gone through once. Of equally good ratios the
    largest, which keeps most pairs. 1.0 where there are no pairs.
    """
    # Lengths recur, so their counts take little memory however many pairs there are.
    counts = Counter(lengths)
    best, best_gap = 1.0, float("inf")
    for step in range(STEPS - 1, -1, -1):
        ratio = step / (STEPS - 1)
        kept = {pair: count for pair, count in counts.items() if keeps(*pair, ratio)}
        if not kept:
            continue
        gaps = sum((chosen - rejected) * count for (chosen, rejected), count in kept.items())
        gap = abs(gaps / sum(kept.values()))
        if gap < best_gap - 1e-12:
            best, best_gap = ratio, gap
    return best
