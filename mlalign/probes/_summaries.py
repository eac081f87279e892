"""What probes say of a whole set: means of both sides with intervals and floors, and separation.

Records are what is drawn again for an interval, never single words or tokens. A statistic that
counts pairs is a quadratic form in how often each record was drawn, so its interval needs no loop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from mlalign.branching.batch import ProbeReading
from mlalign.probes._stats import interval

SIDES = ("base", "adapted", "delta")


@functools.lru_cache(maxsize=16)
def multiplicities(records: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """(resamples, records), read-only: how often each record stands in a bootstrap sample."""
    rng = np.random.default_rng(seed)
    shares = np.full(records, 1 / records)
    drawn_BN = rng.multinomial(records, shares, resamples).astype(np.float64)
    drawn_BN.flags.writeable = False
    return drawn_BN


def quadratic(drawn_BN: np.ndarray, form_NN: np.ndarray) -> np.ndarray:
    """(B,): m^T A m for every row m."""
    return ((drawn_BN @ form_NN) * drawn_BN).sum(1)


def middle(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the finite values; NaN where there is none."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def separation(
    positive: Sequence[Sequence[float]], negative: Sequence[Sequence[float]]
) -> tuple[float, float, float]:
    """AUROC of values given record by record, and its 95 % bootstrap interval over records.

    NaN where either kind has no value, or one that is not finite. Samples that draw only one kind
    have no AUROC and are left out of the interval.
    """
    high, low = (np.array([v for each in kind for v in each]) for kind in (positive, negative))
    if not len(high) or not len(low) or not np.isfinite([*high, *low]).all():
        return float("nan"), float("nan"), float("nan")
    above = (high[:, None] > low[None, :]) + 0.5 * (high[:, None] == low[None, :])
    one, other = (
        np.repeat(np.eye(len(kind)), [len(each) for each in kind], axis=1)
        for kind in (positive, negative)
    )
    drawn_BN = multiplicities(len(positive))
    won = quadratic(drawn_BN, one @ above @ other.T)
    with np.errstate(invalid="ignore"):
        drawn = won / quadratic(drawn_BN, np.outer(one.sum(1), other.sum(1)))
    return float(above.mean()), *middle(drawn)


def aurocs(scores_NY: np.ndarray, positive_NY: np.ndarray) -> np.ndarray:
    """(Y,) AUROC of every column under its own bool labels, ties half, over its finite scores.

    NaN where these are of one class.
    """
    scored_NY = np.isfinite(scores_NY)
    ranks_NY = stats.rankdata(np.where(scored_NY, scores_NY, np.nan), axis=0, nan_policy="omit")
    high_Y = (positive_NY & scored_NY).sum(0)
    low_Y = (~positive_NY & scored_NY).sum(0)
    won_Y = np.where(positive_NY & scored_NY, ranks_NY, 0).sum(0) - high_Y * (high_Y + 1) / 2
    pairs_Y = (high_Y * low_Y).astype(np.float64)
    return won_Y / np.where(pairs_Y > 0, pairs_Y, np.nan)


def jackknife(values_B: np.ndarray) -> tuple[float, float]:
    """95 % interval of the first value from the others, each of the set without one record.

    The standard error is the jackknife's, times Student's t. For statistics that drawing a record
    twice would bias (the length of a mean, a mean over pairs). NaN for fewer than two records.
    """
    value, left = values_B[0], values_B[1:]
    if len(left) < 2:
        return float("nan"), float("nan")
    error = np.sqrt((len(left) - 1) * np.square(left - left.mean()).mean())
    half = stats.t.ppf(0.975, len(left) - 1) * error
    return float(value - half), float(value + half)


def coordinates(states_ND: np.ndarray) -> np.ndarray:
    """(N, at most N) float64: the same points in fewer dimensions, inner products kept.

    Ridge and k-means see nothing else of them, and N is far below a model's width.
    """
    return np.asarray(np.linalg.qr(states_ND.astype(np.float64).T, mode="r")).T


def side_means(
    fixed: dict[str, Any],
    layers: Sequence[int],
    ids: Sequence[str],
    sums: dict[str, np.ndarray],
    counts: np.ndarray,
    repeat: tuple[dict[str, np.ndarray], np.ndarray],
) -> list[ProbeReading]:
    """Means by layer: over the set for every side, and per record for the base and adapted model.

    ``fixed``: step, probe, metric and group. ``sums``: "base" and "adapted" -> (N, layers), sums
    over what is counted in ``counts`` (N,). ``repeat``: the same two of two runs of one model: the
    floor of side "delta" is the mean absolute difference between them.
    """
    floor_L = _floor(*repeat)
    total = int(counts.sum())
    made = []
    for side in SIDES:
        sums_NL = sums["adapted"] - sums["base"] if side == "delta" else sums[side]
        for number, layer in enumerate(layers):
            column = sums_NL[:, number]
            low, high = interval(column.tolist(), counts.tolist())
            made.append(
                ProbeReading(
                    side=side,
                    record="",
                    layer=layer,
                    value=float(column.sum() / total) if total else float("nan"),
                    noise=float(floor_L[number]) if side == "delta" else float("nan"),
                    lo=low,
                    hi=high,
                    n=total,
                    **fixed,
                )
            )
            if side != "delta":
                made += [
                    ProbeReading(
                        side=side,
                        record=record,
                        layer=layer,
                        value=float(value / count),
                        n=int(count),
                        **fixed,
                    )
                    for record, value, count in zip(ids, column, counts, strict=True)
                    if count
                ]
    return made


def _floor(sums: dict[str, np.ndarray], counts: np.ndarray) -> np.ndarray:
    moved_L = np.abs(sums["adapted"] - sums["base"]).sum(0)
    return moved_L / counts.sum() if counts.sum() else np.full(moved_L.shape, np.nan)
