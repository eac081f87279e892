"""DPO with the chosen answer's log-likelihood (RPO)."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from mlalign.objectives.dpo_sft import DpoSft, DpoSftSettings
from tests.objectives import checks


def test_by_hand() -> None:
    out = checks.by_hand(DpoSft(DpoSftSettings(beta=0.1, sft_weight=0.5)))
    # Chosen: 4 nats over 4 tokens.
    assert out.per_pair_N.item() == pytest.approx(0.5543552444685271 + 0.5, abs=1e-6)
    assert out.metrics["loss/dpo"].item() == pytest.approx(0.5543552444685271, abs=1e-6)
    assert out.metrics["loss/sft"].item() == pytest.approx(1.0, abs=1e-6)
    checks.check_rewards(DpoSft(DpoSftSettings(beta=0.1)), 0.1)


def test_at_the_reference_it_is_ln_2_and_the_references_own_loss() -> None:
    same = checks.logps(checks.POLICY + checks.OTHERS)
    objective = DpoSft(DpoSftSettings(sft_weight=2.0))
    assert objective.at_reference is None
    out = objective(same, same)
    expected = math.log(2) + 2 * torch.tensor([1.0, 0.1, 0.5])
    torch.testing.assert_close(out.per_pair_N, expected)
    assert out.margins_N.tolist() == [0, 0, 0]


def test_over_the_batch_each_token_counts_alike() -> None:
    same = checks.logps(checks.POLICY + checks.OTHERS)
    objective = DpoSft(DpoSftSettings(sft_weight=2.0, average="batch"))
    expected = math.log(2) + 2 * (4 + 0.1 + 1.5) / 8
    assert objective(same, same).per_pair_N.mean().item() == pytest.approx(expected)


def test_against_float64_on_random_cases() -> None:
    def formula(beta: float, policy: list, reference: list) -> torch.Tensor:
        chosen, rejected = checks.summed(policy, reference)
        return checks.softplus(-beta * (chosen - rejected)) + 0.7 * checks.nll(policy)

    checks.check_float64(lambda beta: DpoSft(DpoSftSettings(beta=beta, sft_weight=0.7)), formula)


def test_swap_padding_and_mates() -> None:
    checks.check_swap(DpoSft(DpoSftSettings(beta=0.3)))
    checks.check_padding_and_mates(DpoSft(DpoSftSettings(beta=0.3)))


@pytest.mark.parametrize(("key", "value"), [("beta", 0.0), ("beta", -0.1), ("sft_weight", 0.0)])
def test_bounds(key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=key):
        DpoSftSettings.model_validate({key: value})
