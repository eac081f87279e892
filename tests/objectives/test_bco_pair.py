"""Each answer by itself: two binary cross-entropies, no shift."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from mlalign.objectives.bco_pair import BcoPair, BcoPairSettings
from tests.objectives import checks


def test_by_hand() -> None:
    out = checks.by_hand(BcoPair(BcoPairSettings(beta=0.1)))
    assert out.per_pair_N.item() == pytest.approx(0.5981388693815918 + 0.6443966600735709, abs=1e-6)
    checks.check_rewards(BcoPair(BcoPairSettings(beta=0.1)), 0.1)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_at_the_reference_it_is_2_ln_2(beta: float) -> None:
    checks.check_at_reference(BcoPair(BcoPairSettings(beta=beta)), 2 * math.log(2))


def test_what_both_answers_gain_does_not_cancel() -> None:
    """As it does in DPO: here a gain of the rejected answer costs, whatever the chosen one did."""
    both = [[value + 1 for value in row] for row in checks.REFERENCE]
    out = BcoPair(BcoPairSettings(beta=1.0))(checks.logps(both), checks.logps(checks.REFERENCE))
    expected = math.log1p(math.exp(-4)) + math.log1p(math.exp(2))
    assert out.per_pair_N.item() == pytest.approx(expected, abs=1e-5)


def test_the_call_before_changes_nothing() -> None:
    """A running mean of rewards would."""
    objective = BcoPair(BcoPairSettings(beta=1.0))
    first = checks.by_hand(objective).per_pair_N
    objective(checks.logps(checks.OTHERS), checks.logps(checks.OTHERS_REFERENCE))
    torch.testing.assert_close(checks.by_hand(objective).per_pair_N, first, atol=0, rtol=0)


def test_against_float64_on_random_cases() -> None:
    def formula(beta: float, policy: list, reference: list) -> torch.Tensor:
        chosen, rejected = checks.summed(policy, reference)
        return checks.softplus(-beta * chosen) + checks.softplus(beta * rejected)

    checks.check_float64(lambda beta: BcoPair(BcoPairSettings(beta=beta)), formula)


def test_swap_padding_and_mates() -> None:
    checks.check_swap(BcoPair(BcoPairSettings(beta=0.3)))
    checks.check_padding_and_mates(BcoPair(BcoPairSettings(beta=0.3)))


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValidationError, match="beta"):
        BcoPairSettings(beta=beta)
