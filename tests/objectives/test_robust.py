"""Robust DPO: unbiased under flips, DPO without them."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from mlalign.objectives.dpo import Dpo, DpoSettings
from mlalign.objectives.robust import Robust, RobustSettings
from tests.objectives import checks

BY_HAND = 0.5168552444685272
"""(0.9 * log(1 + e^-0.3) - 0.1 * log(1 + e^0.3)) / 0.8"""


def test_by_hand() -> None:
    robust = Robust(RobustSettings(beta=0.1, label_smoothing=0.1))
    assert checks.by_hand(robust).per_pair_N.item() == pytest.approx(BY_HAND, abs=1e-6)
    checks.check_rewards(robust, 0.1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.49])
def test_at_the_reference_it_is_ln_2_for_every_share(share: float) -> None:
    robust = Robust(RobustSettings(label_smoothing=share))
    # At 0.49 the terms are divided by 0.02: float32 rounding is 50 times larger.
    same = checks.logps(checks.POLICY)
    assert robust.at_reference == pytest.approx(math.log(2), rel=1e-12)
    assert robust(same, same).per_pair_N.item() == pytest.approx(math.log(2), abs=1e-5)
    if share < 0.4:
        checks.check_at_reference(robust, math.log(2))


def test_its_mean_over_flips_is_dpo_on_the_clean_labels() -> None:
    share = 0.3
    robust = Robust(RobustSettings(beta=0.4, label_smoothing=share))
    kept = checks.by_hand(robust).per_pair_N
    flipped = robust(checks.logps(checks.POLICY[::-1]), checks.logps(checks.REFERENCE[::-1]))
    mean = (1 - share) * kept + share * flipped.per_pair_N
    torch.testing.assert_close(mean, checks.by_hand(Dpo(DpoSettings(beta=0.4))).per_pair_N)
    assert not torch.allclose(kept, mean, atol=1e-2)


def test_without_flips_it_is_dpo() -> None:
    robust = Robust(RobustSettings(beta=0.4, label_smoothing=0.0))
    dpo = Dpo(DpoSettings(beta=0.4))
    torch.testing.assert_close(checks.by_hand(robust).per_pair_N, checks.by_hand(dpo).per_pair_N)


def test_against_float64_on_random_cases() -> None:
    def formula(beta: float, policy: list, reference: list) -> torch.Tensor:
        chosen, rejected = checks.summed(policy, reference)
        margin = beta * (chosen - rejected)
        return (0.8 * checks.softplus(-margin) - 0.2 * checks.softplus(margin)) / 0.6

    checks.check_float64(
        lambda beta: Robust(RobustSettings(beta=beta, label_smoothing=0.2)), formula
    )


def test_swap_padding_and_mates() -> None:
    checks.check_swap(Robust(RobustSettings(beta=0.3, label_smoothing=0.2)))
    checks.check_padding_and_mates(Robust(RobustSettings(beta=0.3, label_smoothing=0.2)))


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta", 0.0), ("beta", -0.1), ("label_smoothing", 0.5), ("label_smoothing", -0.1)],
)
def test_bounds(key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=key):
        RobustSettings.model_validate({key: value})
