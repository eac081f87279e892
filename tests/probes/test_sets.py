"""Sets, their controls and block intervals against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mlalign.probes import _sets


def test_top_takes_the_largest_above_zero() -> None:
    scores = np.array([[0.0, 3.0, math.nan], [2.0, -1.0, 3.0]])
    assert _sets.top(scores, 2).tolist() == [1, 5]
    assert _sets.top(scores, 6).tolist() == [1, 3, 5]


def test_overlap_of_random_sets_is_that_of_all_sets() -> None:
    fixed = np.arange(3)
    every = [_sets.jaccard(fixed, np.array(s)) for s in itertools.combinations(range(7), 4)]
    found = _sets.random_jaccard(3, 4, 7)
    assert found.value == pytest.approx(np.mean(every), abs=1e-12)
    assert min(every) <= found.lo <= found.value <= found.hi <= max(every)
    assert math.isnan(_sets.random_jaccard(0, 0, 7).value)
    assert math.isnan(_sets.jaccard(np.array([]), np.array([])))


def test_random_sets_are_matched_by_layer() -> None:
    values = np.stack([np.zeros(50), np.full(50, 10.0), np.arange(50.0)])
    alone = _sets.random_mean(values, np.array([50, 60, 70]))
    assert alone[:3] == (10, 10, 10)
    mixed = _sets.random_mean(values, np.array([0, 50, 100, 101]))
    assert mixed.value == pytest.approx((0 + 10 + 2 * 24.5) / 4)
    assert mixed.lo < mixed.value < mixed.hi


def test_jackknife_of_a_mean_is_students_interval() -> None:
    rng = np.random.default_rng(0)
    blocks = list(rng.normal(size=8))
    key = ("mean", "", -1)
    found = _sets.jackknife(lambda part: {key: float(np.mean(part))}, blocks)[key]
    half = 2.364624 * np.std(blocks, ddof=1) / 8**0.5
    assert found.value == pytest.approx(np.mean(blocks))
    assert (found.lo, found.hi) == pytest.approx((found.value - half, found.value + half), rel=1e-6)
    alone = _sets.jackknife(lambda part: {key: float(np.mean(part))}, blocks[:1])[key]
    assert math.isnan(alone.lo) and alone.value == blocks[0]
