"""Readings of means and of AUROC, with intervals from whole records drawn again (bootstrap).

Both sides are drawn together, so the interval of "delta" is that of the paired difference. The
noise, on side "delta", is the mean absolute difference per record between two runs of the same
model; that of an AUROC is the difference of the two AUROC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlalign.branching.batch import ProbeReading
from mlalign.probes._stats import drawn_times

RESAMPLES = 1000
TIE = 1e-4
"""Words whose values differ by less than this share of the values' range are tied."""
CHUNK = 32
"""AUROC of so many cells at a time, for the memory's sake."""


@dataclass(frozen=True)
class Cells:
    """Sums (N, L, H) of one metric over each record's rows or words, and counts (N, L)."""

    sums_NLH: np.ndarray
    counts_NL: np.ndarray

    def means(self, weights_BN: np.ndarray) -> np.ndarray:
        """(B, L, H): sum over records of weight x sum / weight x count; NaN without counts."""
        records, layers, heads = self.sums_NLH.shape
        sums_BX = weights_BN @ self.sums_NLH.reshape(records, layers * heads)
        counts_BL = weights_BN @ self.counts_NL
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums_BX.reshape(-1, layers, heads) / counts_BL[..., None]


@dataclass(frozen=True)
class Words:
    """Values (W, L, H) of the object words of each record, by side; which of them are real."""

    values: dict[str, list[np.ndarray]]
    real: list[np.ndarray]


def draws(kept_N: np.ndarray) -> np.ndarray:
    """(resamples, N): how often each record was drawn; only records that are kept are."""
    weights_BN = np.zeros((RESAMPLES, len(kept_N)))
    weights_BN[:, kept_N] = drawn_times(int(kept_N.sum()), RESAMPLES)
    return weights_BN


def percentiles(values_BX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """2.5 % and 97.5 % over the first axis, draws where nothing was defined left out."""
    if not np.isnan(values_BX).any():
        low, high = np.percentile(values_BX, [2.5, 97.5], axis=0)
        return low, high
    low, high = (np.full(values_BX.shape[1:], np.nan) for _ in range(2))
    for cell in zip(*np.nonzero(~np.isnan(values_BX).all(0)), strict=True):
        column = values_BX[(slice(None), *cell)]
        low[cell], high[cell] = np.percentile(column[~np.isnan(column)], [2.5, 97.5])
    return low, high


def mean_defined(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over an axis without its NaN; NaN where there is nothing else, without a warning."""
    defined = ~np.isnan(values)
    counts = defined.sum(axis)
    sums = np.where(defined, values, 0).sum(axis)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _levels(values_BLH: np.ndarray) -> dict[str, np.ndarray]:
    """By head, by layer (mean over heads), and over all (mean over the layers that are read)."""
    by_layer_BL = mean_defined(values_BLH, -1)
    return {"": mean_defined(by_layer_BL, -1)[:, None], "layer": by_layer_BL, "head": values_BLH}


def _emit(
    fixed: dict[str, Any],
    value_LH: np.ndarray,
    drawn_BLH: np.ndarray,
    noise_LH: np.ndarray,
    n_L: np.ndarray,
    heads: bool,
) -> list[ProbeReading]:
    """Readings at each level; layers where nothing was counted are left out, the whole is not."""
    values, drawn, noises = (_levels(v) for v in (value_LH[None], drawn_BLH, noise_LH[None]))
    made: list[ProbeReading] = []
    for level in ("", "layer", "head") if heads else ("", "layer"):
        low, high = percentiles(drawn[level])
        for cell in np.ndindex(low.shape):
            n = int(n_L[cell[0]]) if level else int(n_L.max(initial=0))
            if level and not n:
                continue
            made.append(
                ProbeReading(
                    record="",
                    layer=cell[0] if level else -1,
                    head=cell[1] if level == "head" else -1,
                    value=float(values[level][0][cell]),
                    lo=float(low[cell]),
                    hi=float(high[cell]),
                    noise=float(noises[level][0][cell]),
                    n=n,
                    **fixed,
                )
            )
    return made


def means(
    fixed: dict[str, Any],
    metric: str,
    ids: Sequence[str],
    cells: dict[str, Cells],
    again: dict[str, Cells],
    heads: bool = False,
) -> list[ProbeReading]:
    """Readings of a mean: over the set on three sides, and by record on two.

    ``cells``: by side. ``again``: the same of two runs of one model. ``heads``: also by head.
    """
    base, adapted = cells["base"], cells["adapted"]
    fixed = {**fixed, "metric": metric}
    kept_N = (base.counts_NL + adapted.counts_NL).sum(1) > 0
    if not kept_N.any():
        return [
            ProbeReading(record="", side=side, n=0, **fixed)
            for side in ("base", "adapted", "delta")
        ]
    found = {}
    for name, weights in (("value", kept_N[None].astype(float)), ("drawn", draws(kept_N))):
        found[name] = {side: each.means(weights) for side, each in cells.items()}
        found[name]["delta"] = found[name]["adapted"] - found[name]["base"]
    n_L = {side: each.counts_NL.sum(0) for side, each in cells.items()}
    n_L["delta"] = np.minimum(n_L["base"], n_L["adapted"])
    made: list[ProbeReading] = []
    for side in ("base", "adapted", "delta"):
        value_LH = found["value"][side][0]
        noise_LH = _floor(again) if side == "delta" else np.full_like(value_LH, np.nan)
        where = {**fixed, "side": side}
        made += _emit(where, value_LH, found["drawn"][side], noise_LH, n_L[side], heads)
    return made + [
        reading for side, each in cells.items() for reading in _by_record(fixed, side, ids, each)
    ]


def _floor(again: dict[str, Cells]) -> np.ndarray:
    """(L, H): mean over records of the absolute difference between two runs."""
    one, other = (
        each.means(np.eye(len(each.counts_NL))) for each in (again["base"], again["adapted"])
    )
    return mean_defined(np.abs(one - other), 0)


def _by_record(
    fixed: dict[str, Any], side: str, ids: Sequence[str], cells: Cells
) -> list[ProbeReading]:
    """Each record's own mean, over heads and layers."""
    values_N = _levels(cells.means(np.eye(len(ids))))[""][:, 0]
    counts_N = cells.counts_NL.max(1)
    return [
        ProbeReading(record=record, side=side, value=float(value), n=int(count), **fixed)
        for record, value, count in zip(ids, values_N, counts_N, strict=True)
        if count
    ]


def aurocs(
    values: Sequence[np.ndarray], real: Sequence[np.ndarray], weights_BN: np.ndarray
) -> np.ndarray:
    """(B, X): P(a real word exceeds an absent one), ties half, records weighted.

    A tie is a difference below ``TIE`` of the values' range. Such pairs are common: where two
    answers begin alike, the words in which they part are produced by equal rows, and rounding
    alone, which depends on the batch, would say which is larger.
    ``values``: (W, X) by record, NaN words left out. NaN where either kind has no weight.
    """
    records = np.repeat(np.arange(len(values)), [len(each) for each in values])
    values_WX, real_W = np.concatenate(list(values)), np.concatenate(list(real))
    out = np.full((len(weights_BN), values_WX.shape[1]), np.nan)
    # Everything that is summed is a whole number: exact in float32 up to 16 million pairs.
    of_NW = (records == np.arange(len(values))[:, None]).astype(np.float32)
    weights_BN = weights_BN.astype(np.float32)
    for start in range(0, values_WX.shape[1], CHUNK):
        part_WX = values_WX[:, start : start + CHUNK]
        yes_RX, no_AX = part_WX[real_W], part_WX[~real_W]
        tie_X = TIE * _spread(part_WX)
        above_RAX = (yes_RX[:, None] > no_AX + tie_X).astype(np.float32)
        above_RAX += yes_RX[:, None] >= no_AX - tie_X
        wins_NAX = np.tensordot(of_NW[:, real_W], above_RAX, 1)
        wins_NMX = np.tensordot(wins_NAX, of_NW[:, ~real_W], (1, 1)).swapaxes(1, 2)
        won_BX = np.einsum("bmx,bm->bx", np.tensordot(weights_BN, wins_NMX, 1), weights_BN)
        pairs_BX = (weights_BN @ (of_NW[:, real_W] @ ~np.isnan(yes_RX))) * (
            weights_BN @ (of_NW[:, ~real_W] @ ~np.isnan(no_AX))
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            out[:, start : start + CHUNK] = won_BX / 2 / pairs_BX
    return out


def _spread(values_WX: np.ndarray) -> np.ndarray:
    """(X,): largest minus smallest; 0 where nothing is defined."""
    missing = np.isnan(values_WX)
    most = np.where(missing, -np.inf, values_WX).max(0, initial=-np.inf)
    least = np.where(missing, np.inf, values_WX).min(0, initial=np.inf)
    return np.where(most >= least, most - least, 0)


def separations(
    fixed: dict[str, Any], metric: str, words: Words, again: Words, heads: bool = False
) -> list[ProbeReading]:
    """Readings of <metric>_auroc, over the set: a layer's is that of its mean over heads, the
    whole that of the mean over layers.

    Chance is 0.5. Where there are no real or no absent words: NaN with n = 0.
    """
    fixed = {**fixed, "metric": f"{metric}_auroc", "group": "", "record": ""}
    sides = ("base", "adapted", "delta")
    real = [int(each.sum()) for each in words.real]
    absent = [len(each) - yes for each, yes in zip(words.real, real, strict=True)]
    if not sum(real) or not sum(absent):
        return [ProbeReading(side=side, n=0, **fixed) for side in sides]
    kept_N = np.array([len(each) > 0 for each in words.real])
    weights_BN = np.concatenate([kept_N[None].astype(float), draws(kept_N)])
    found = _aurocs_of_sides(words, weights_BN, heads)
    twice = None
    if any(each.any() for each in again.real) and any((~each).any() for each in again.real):
        weights_1N = np.ones((1, len(again.real)))
        twice = np.abs(_aurocs_of_sides(again, weights_1N, heads)["delta"][0])
    layers = next(v.shape[1] for v, keep in zip(words.values["base"], kept_N, strict=True) if keep)
    width = max(each.shape[-1] for each in words.values["base"])
    made: list[ProbeReading] = []
    for side in sides:
        low, high = percentiles(found[side][1:])
        for cell, value in enumerate(found[side][0]):
            if cell and np.isnan(value):
                continue
            layer = cell - 1 if cell <= layers else (cell - 1 - layers) // width
            made.append(
                ProbeReading(
                    side=side,
                    layer=layer,
                    head=(cell - 1 - layers) % width if cell > layers else -1,
                    value=float(value),
                    lo=float(low[cell]),
                    hi=float(high[cell]),
                    noise=float(twice[cell]) if twice is not None and side == "delta" else np.nan,
                    n=sum(real) + sum(absent),
                    **fixed,
                )
            )
    return made


def _aurocs_of_sides(words: Words, weights_BN: np.ndarray, heads: bool) -> dict[str, np.ndarray]:
    """Side -> (B, 1 + L [+ L x H]): over all, by layer, by head."""
    found = {}
    for side, values in words.values.items():
        flat = []
        # A record without words has neither layers nor heads; it stays, for the records to match.
        for each in values:
            level = _levels(each) if len(each) else {}
            parts = [level[""], level["layer"]] if level else []
            if heads and level:
                parts.append(level["head"].reshape(len(each), -1))
            flat.append(np.concatenate(parts, 1) if parts else None)
        width = max(each.shape[1] for each in flat if each is not None)
        flat = [np.zeros((0, width)) if each is None else each for each in flat]
        found[side] = aurocs(flat, words.real, weights_BN)
    found["delta"] = found["adapted"] - found["base"]
    return found
