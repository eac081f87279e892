"""Hinge: linear below a margin of 1, flat above it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mlalign.objectives.hinge import Hinge, HingeSettings
from tests.objectives import checks


def test_by_hand() -> None:
    out = checks.by_hand(Hinge(HingeSettings(beta=0.1)))
    assert out.per_pair_N.item() == pytest.approx(0.7, abs=1e-6)
    checks.check_rewards(Hinge(HingeSettings(beta=0.1)), 0.1)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_at_the_reference_it_is_1(beta: float) -> None:
    checks.check_at_reference(Hinge(HingeSettings(beta=beta)), 1.0)


def test_a_pair_past_the_margin_gives_neither_loss_nor_gradient() -> None:
    policy = checks.logps(checks.POLICY)
    policy.logps_CS.requires_grad_()
    out = Hinge(HingeSettings(beta=0.4))(policy, checks.logps(checks.REFERENCE))  # margin 1.2
    assert out.per_pair_N.item() == 0
    out.per_pair_N.sum().backward()
    assert policy.logps_CS.grad is not None and not policy.logps_CS.grad.any()


def test_against_float64_on_random_cases() -> None:
    clipped = []

    def formula(beta: float, policy: list, reference: list) -> torch.Tensor:
        chosen, rejected = checks.summed(policy, reference)
        loss = 1 - beta * (chosen - rejected)
        clipped.extend((loss < 0).tolist())
        return torch.where(loss > 0, loss, torch.zeros_like(loss))

    checks.check_float64(lambda beta: Hinge(HingeSettings(beta=beta)), formula)
    assert 20 < sum(clipped) < 180


def test_swap_padding_and_mates() -> None:
    checks.check_swap(Hinge(HingeSettings(beta=0.3)))
    checks.check_padding_and_mates(Hinge(HingeSettings(beta=0.3)))


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValidationError, match="beta"):
        HingeSettings(beta=beta)
