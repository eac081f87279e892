"""Length-averaged DPO: DPO's formula on means, with a reference."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from mlalign.objectives.dpo import Dpo, DpoSettings
from mlalign.objectives.dpo_mean import DpoMean, DpoMeanSettings
from tests.objectives import checks


def test_by_hand() -> None:
    out = checks.by_hand(DpoMean(DpoMeanSettings(beta=0.3)))
    assert out.per_pair_N.item() == pytest.approx(0.5543552444685271, abs=1e-6)
    assert out.metrics["logratios/per_token_margins"].item() == pytest.approx(1, abs=1e-6)
    checks.check_rewards(DpoMean(DpoMeanSettings(beta=0.3)), 0.3)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_at_the_reference_it_is_ln_2(beta: float) -> None:
    checks.check_at_reference(DpoMean(DpoMeanSettings(beta=beta)), math.log(2))


def test_the_reference_counts() -> None:
    """Without it, this would be SimPO."""
    objective = DpoMean(DpoMeanSettings(beta=2.0))
    other = objective(checks.logps(checks.POLICY), checks.logps(checks.POLICY))
    assert not torch.allclose(other.per_pair_N, checks.by_hand(objective).per_pair_N, atol=0.1)


def test_with_one_length_it_is_dpo_at_beta_over_that_length() -> None:
    policy, reference = checks.POLICY[:1] * 2, [*checks.REFERENCE[:1], [-1.0] * 4]
    mean = DpoMean(DpoMeanSettings(beta=2.0))(checks.logps(policy), checks.logps(reference))
    summed = Dpo(DpoSettings(beta=0.5))(checks.logps(policy), checks.logps(reference))
    torch.testing.assert_close(mean.per_pair_N, summed.per_pair_N)


def test_against_float64_on_random_cases() -> None:
    def formula(beta: float, policy: list, reference: list) -> torch.Tensor:
        chosen, rejected = checks.averaged(policy, reference)
        return checks.softplus(-beta * (chosen - rejected))

    checks.check_float64(lambda beta: DpoMean(DpoMeanSettings(beta=beta)), formula)


def test_swap_padding_and_mates() -> None:
    checks.check_swap(DpoMean(DpoMeanSettings(beta=2.0)))
    checks.check_padding_and_mates(DpoMean(DpoMeanSettings(beta=2.0)))


@pytest.mark.parametrize("settings", [{}, {"beta": 0.0}, {"beta": -5.0}])
def test_beta_must_be_given_and_positive(settings: dict) -> None:
    with pytest.raises(ValidationError, match="beta"):
        DpoMeanSettings.model_validate(settings)
