"""The behaviour direction: from states that have read an absent object word to a real one.

Letters: N records, L layers, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlalign.probes._probe import ProbeBatch
from mlalign.probes._sets import Estimate, Key
from mlalign.probes._stats import relative
from mlalign.probes._word_rows import written

RESAMPLES, SHUFFLES = 500, 200
LIMIT = 64
"""Words of a record."""


@dataclass
class Shift:
    """One record's part in both, by layer."""

    moved_LD: np.ndarray
    """Mean over answer tokens of adapted minus base states."""
    gap_LD: np.ndarray
    """Mean base state at real words minus that at absent ones; NaN without both kinds."""


def word_positions(batch: ProbeBatch, row: int) -> tuple[Tensor, Tensor]:
    """int64; positions of the last tokens of real, and of absent, object words."""
    queries = batch.queries(row)
    found: dict[bool, list[int]] = {True: [], False: []}
    for word in written(batch.items[row], LIMIT):
        found[word.mention.real].append(int(queries[word.completion][word.token]))
    real, absent = (torch.tensor(found[kind], dtype=torch.long) for kind in (True, False))
    return real, absent


def offset_estimates(shifts: list[Shift], layers: list[int]) -> dict[Key, Estimate]:
    """How the common offset lies to the behaviour direction, by layer and as a mean over layers.

    Records without both kinds of words are left out of the direction only.
    """
    both = [s for s in shifts if np.isfinite(s.gap_LD).all()]
    names = ("offset_cosine", "offset_gaps", "offset_cosine_shuffled")
    if not both:
        nan = float("nan")
        return {(name, "", layer): Estimate(nan, nan, nan, 0) for name in names for layer in [-1]}
    moved_NLD = np.stack([s.moved_LD for s in shifts]).astype(np.float64)
    gap_NLD = np.stack([s.gap_LD for s in both]).astype(np.float64)
    rng = np.random.default_rng(0)
    at = _against(moved_NLD.mean(0), gap_NLD.mean(0))
    known = np.array([np.isfinite(s.gap_LD).all() for s in shifts])
    order = np.cumsum(known) - 1
    drawn: list[np.ndarray] = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(0, len(shifts), len(shifts))
        kept = order[chosen[known[chosen]]]
        if len(kept):
            drawn.append(_against(moved_NLD[chosen].mean(0), gap_NLD[kept].mean(0)))
    flipped = [
        _against(
            moved_NLD.mean(0), (rng.choice((-1, 1), len(both))[:, None, None] * gap_NLD).mean(0)
        )
        for _ in range(SHUFFLES)
    ]
    made: dict[Key, Estimate] = {}
    several = len(shifts) > 1
    for number, name in enumerate(names[:2]):
        made |= _layered(name, layers, at[number], [d[number] for d in drawn], several, len(both))
    shuffled = np.mean([f[0] for f in flipped], axis=0)
    return made | _layered(names[2], layers, shuffled, [f[0] for f in flipped], True, len(both))


def _against(offset_LD: np.ndarray, gap_LD: np.ndarray) -> np.ndarray:
    """(2, L): cosine, and the offset along the gap in gaps. An offset of zero gives 0."""
    inner_L = (offset_LD * gap_LD).sum(1)
    length_L, gap_L = np.linalg.norm(offset_LD, axis=1), np.linalg.norm(gap_LD, axis=1)
    cosines = [
        relative(float(i), float(a * b)) for i, a, b in zip(inner_L, length_L, gap_L, strict=True)
    ]
    gaps = [relative(float(i), float(b * b)) for i, b in zip(inner_L, gap_L, strict=True)]
    return np.array([cosines, gaps])


def _layered(
    name: str,
    layers: list[int],
    value_L: np.ndarray,
    drawn: list[np.ndarray],
    limits: bool,
    n: int,
) -> dict[Key, Estimate]:
    """Each layer's and the mean over layers, with the middle 95 % of ``drawn``."""
    columns = {-1: (value_L.mean(), [d.mean() for d in drawn])}
    columns |= {layer: (value_L[at], [d[at] for d in drawn]) for at, layer in enumerate(layers)}
    made = {}
    for layer, (value, each) in columns.items():
        low, high = np.percentile(each, [2.5, 97.5]) if limits and each else (np.nan, np.nan)
        made[name, "", layer] = Estimate(float(value), float(low), float(high), n)
    return made
