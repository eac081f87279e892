"""Statistics against planted truths and explicit computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlalign.probes._stats import (
    auroc,
    debiased_cka,
    effective_rank,
    interval,
    intervals,
    relative,
    resampled,
    update_spectrum,
)

RNG = np.random.default_rng(0)


def test_cka_of_an_orthogonal_map_is_one() -> None:
    x = RNG.normal(size=(64, 32))
    turn, _ = np.linalg.qr(RNG.normal(size=(32, 32)))
    assert debiased_cka(x, 3 * x @ turn + 100) == pytest.approx(1, abs=1e-9)


def test_cka_of_independent_data_is_near_zero_in_high_dimension() -> None:
    values = [
        debiased_cka(RNG.normal(size=(64, 128)), RNG.normal(size=(64, 128))) for _ in range(20)
    ]
    assert abs(np.mean(values)) < 0.03
    x, y = RNG.normal(size=(64, 128)), RNG.normal(size=(64, 128))
    x, y = x - x.mean(0), y - y.mean(0)
    biased = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert biased > 0.5, "what the debiasing is for"


def test_cka_is_the_unbiased_hsic() -> None:
    x, y = RNG.normal(size=(9, 5)), RNG.normal(size=(9, 4))

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        n = len(a)
        k, m = a @ a.T, b @ b.T
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        ones = np.ones(n)
        total = np.trace(k @ m) + ones @ k @ ones * (ones @ m @ ones) / (n - 1) / (n - 2)
        return (total - 2 / (n - 2) * ones @ k @ m @ ones) / n / (n - 3)

    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert debiased_cka(x, y) == pytest.approx(expected, abs=1e-9)


def test_cka_needs_samples_that_vary() -> None:
    assert math.isnan(debiased_cka(np.ones((3, 2)), np.ones((3, 2))))
    assert math.isnan(debiased_cka(np.ones((9, 2)), RNG.normal(size=(9, 2))))


def test_auroc_by_hand() -> None:
    assert auroc([3.0, 2.0], [1.0, 2.0]) == pytest.approx(3.5 / 4)
    assert auroc([1.0], [0.0]) == 1 and math.isnan(auroc([], [1.0]))


def test_interval_covers_and_draws_whole_records() -> None:
    low, high = interval([0.0, 4.0], [2, 2])
    assert (low, high) == (0.0, 2.0)
    assert interval([6.0, 0.0], [2, 0]) == (3.0, 3.0)
    assert all(math.isnan(v) for v in interval([], []))
    assert interval([1.0, 2.0, 3.0], [1, 1, 1]) == interval([1.0, 2.0, 3.0], [1, 1, 1])


def test_intervals_are_those_of_each_column_alone() -> None:
    sums, counts = RNG.normal(size=(9, 3)), np.array([1, 2, 0, 1, 3, 1, 1, 1, 2])
    low, high = intervals(sums, counts)
    for column in range(3):
        one = interval(sums[:, column].tolist(), counts.tolist())
        assert one == pytest.approx((low[column], high[column]), abs=1e-12)
    # By hand: whole records drawn again, numerator and denominator together.
    kept = counts > 0
    draws = np.random.default_rng(0).integers(0, 8, (1000, 8))
    ratios = sums[kept, 0][draws].sum(1) / counts[kept][draws].sum(1)
    assert low[0] == pytest.approx(np.percentile(ratios, 2.5), abs=1e-12)
    assert resampled(np.ones((4, 2)), np.array([[2.0, 0]] * 4))[0, 0] == 0.5


def test_what_is_not_finite_stays_so() -> None:
    assert math.isnan(auroc([1.0, math.nan], [0.0])) and math.isnan(auroc([math.inf], [0.0]))
    assert all(math.isnan(v) for v in interval([1.0, math.nan], [1, 1]))
    broken = torch.full((4, 8), math.nan)
    singular = update_spectrum(torch.randn(8, 4), broken, 1.0)
    assert singular.isnan().all() and math.isnan(effective_rank(singular))
    assert math.isnan(debiased_cka(np.full((9, 2), math.nan), RNG.normal(size=(9, 2))))


def test_spectrum_equals_the_explicit_product() -> None:
    b, a = torch.randn(40, 4), torch.randn(4, 30)
    expected = torch.linalg.svdvals((0.5 * b @ a).double())[:4]
    assert (update_spectrum(b, a, 0.5) - expected).abs().max() < 1e-5
    assert (update_spectrum(b, a, -0.5) - expected).abs().max() < 1e-5


def test_effective_rank_of_planted_spectra() -> None:
    assert effective_rank(torch.zeros(4)) == 0
    assert effective_rank(torch.tensor([2.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.full((4,), 0.3)) == pytest.approx(4)


def test_relative() -> None:
    assert relative(0.0, 0.0) == 0 and relative(1.0, 2.0) == 0.5 and math.isnan(relative(1.0, 0.0))
