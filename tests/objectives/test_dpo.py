"""DPO: by hand, in float64, at the reference, and under swaps, padding and batch-mates."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from mlalign.branching.batch import TokenLogps
from mlalign.objectives.dpo import Dpo, DpoSettings


def test_by_hand() -> None:
    out = Dpo(DpoSettings(beta=0.1))(
        _logps([[-1.0, -2.0], [-4.0, 0.0]]), _logps([[-3.0, -2.0], [-3.0, 0.0]])
    )
    assert out.per_pair_N.item() == pytest.approx(math.log1p(math.exp(-0.3)), abs=1e-6)
    assert out.margins_N.item() == pytest.approx(0.3, abs=1e-6)
    assert out.chosen_rewards_N.item() == pytest.approx(0.2, abs=1e-6)
    assert out.rejected_rewards_N.item() == pytest.approx(-0.1, abs=1e-6)


def test_at_the_reference_it_is_ln_2() -> None:
    logps = _logps([[-1.0, -2.0], [-4.0, -7.0]])
    out = Dpo(DpoSettings())(logps, logps)
    assert out.per_pair_N.item() == pytest.approx(Dpo.at_reference, abs=1e-6)
    assert out.margins_N.item() == 0


def test_against_float64_on_random_cases() -> None:
    torch.manual_seed(0)
    for _ in range(50):
        policy, reference = torch.randn(8, 5).double() * 3, torch.randn(8, 5).double() * 3
        beta = float(torch.rand(()) + 0.01)
        out = Dpo(DpoSettings(beta=beta))(_logps(policy.tolist()), _logps(reference.tolist()))
        ratio = (policy - reference).sum(-1)
        expected = torch.log1p(torch.exp(-beta * (ratio[0::2] - ratio[1::2])))
        torch.testing.assert_close(out.per_pair_N.double(), expected, atol=1e-5, rtol=1e-5)


def test_swapping_the_pair_negates_the_margin_and_padding_changes_nothing() -> None:
    policy, reference = [[-1.0, -2.0], [-4.0, -1.0]], [[-2.0, -2.0], [-1.0, -3.0]]
    dpo = Dpo(DpoSettings(beta=0.5))
    out = dpo(_logps(policy), _logps(reference))
    swapped = dpo(_logps(policy[::-1]), _logps(reference[::-1]))
    assert swapped.margins_N.item() == pytest.approx(-out.margins_N.item())
    padded = dpo(_logps(policy, pad=3), _logps(reference, pad=3))
    assert padded.per_pair_N.item() == pytest.approx(out.per_pair_N.item())
    with_mates = dpo(_logps(policy + policy[::-1]), _logps(reference + reference[::-1]))
    assert with_mates.per_pair_N[0].item() == pytest.approx(out.per_pair_N.item())


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValidationError, match="beta"):
        DpoSettings(beta=beta)


def _logps(rows: list[list[float]], pad: int = 0) -> TokenLogps:
    values = torch.tensor([[*row, *[-9.0] * pad] for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * pad for row in rows])
    zeros = torch.zeros_like(values)
    return TokenLogps(
        logps_CS=values, mask_CS=mask, entropy_CS=zeros, top1_CS=mask, mean_logit_CS=zeros
    )
