"""IPO: the squared form on per-token means, not on sums."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mlalign.objectives.ipo import Ipo, IpoSettings
from tests.objectives import checks


def test_by_hand() -> None:
    out = checks.by_hand(Ipo(IpoSettings(beta=0.1)))
    assert out.per_pair_N.item() == pytest.approx(16, abs=1e-5)
    assert out.metrics["logratios/per_token_margins"].item() == pytest.approx(1, abs=1e-6)
    checks.check_rewards(Ipo(IpoSettings(beta=0.1)), 0.1)


@pytest.mark.parametrize(("beta", "loss"), [(0.1, 25.0), (0.5, 1.0), (2.0, 0.0625)])
def test_at_the_reference_it_is_a_quarter_over_beta_squared(beta: float, loss: float) -> None:
    checks.check_at_reference(Ipo(IpoSettings(beta=beta)), loss)


def test_least_where_the_per_token_margin_is_one_over_two_beta() -> None:
    out = checks.by_hand(Ipo(IpoSettings(beta=0.5)))  # the pair's margin is 1 nat per token
    assert out.per_pair_N.item() == pytest.approx(0, abs=1e-10)


def test_longer_answers_with_the_same_mean_change_nothing() -> None:
    ipo = Ipo(IpoSettings(beta=0.1))
    once = checks.by_hand(ipo)
    twice = ipo(
        checks.logps([row * 2 for row in checks.POLICY]),
        checks.logps([row * 2 for row in checks.REFERENCE]),
    )
    torch.testing.assert_close(twice.per_pair_N, once.per_pair_N)
    torch.testing.assert_close(twice.margins_N, 2 * once.margins_N)


def test_against_float64_on_random_cases() -> None:
    def formula(beta: float, policy: list, reference: list) -> torch.Tensor:
        chosen, rejected = checks.averaged(policy, reference)
        return (chosen - rejected - 1 / (2 * beta)) ** 2

    checks.check_float64(lambda beta: Ipo(IpoSettings(beta=beta)), formula)


def test_swap_padding_and_mates() -> None:
    checks.check_swap(Ipo(IpoSettings(beta=0.3)))
    checks.check_padding_and_mates(Ipo(IpoSettings(beta=0.3)))


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValidationError, match="beta"):
        IpoSettings(beta=beta)
