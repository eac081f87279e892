"""The chosen answer's loss: each answer's own mean, or TRL's mean over the batch."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mlalign.objectives.sft import Sft, SftSettings
from tests.objectives import checks


def test_by_hand() -> None:
    assert checks.by_hand(Sft(SftSettings())).per_pair_N.item() == pytest.approx(1.0)
    two = checks.logps([[-1.0, -2.0], [-7.0]])
    assert Sft(SftSettings())(two, two).per_pair_N.item() == pytest.approx(1.5)
    checks.check_rewards(Sft(SftSettings()), 1.0)


def test_no_closed_form_but_the_references_own_loss() -> None:
    same = checks.logps(checks.POLICY)
    sft = Sft(SftSettings())
    assert sft.at_reference is None
    torch.testing.assert_close(sft(same, same).per_pair_N, checks.by_hand(sft).per_pair_N)
    assert sft(same, same).margins_N.item() == 0


def test_the_rejected_answer_has_no_gradient() -> None:
    policy = checks.logps(checks.POLICY)
    policy.logps_CS.requires_grad_()
    Sft(SftSettings())(policy, checks.logps(checks.REFERENCE)).per_pair_N.sum().backward()
    assert policy.logps_CS.grad is not None
    assert policy.logps_CS.grad[0].tolist() == [-0.25] * 4
    assert not policy.logps_CS.grad[1].any()


def test_over_the_batch_each_token_counts_alike() -> None:
    rows = checks.logps(checks.POLICY + checks.OTHERS)  # chosen answers of 4, 1 and 3 tokens
    by_pair = Sft(SftSettings(average="pair"))(rows, rows).per_pair_N
    by_token = Sft(SftSettings(average="batch"))(rows, rows).per_pair_N
    torch.testing.assert_close(by_pair, torch.tensor([1.0, 0.1, 0.5]))
    assert by_token.mean().item() == pytest.approx((4 + 0.1 + 1.5) / 8)
    assert by_pair.mean().item() == pytest.approx(1.6 / 3)


def test_against_float64_on_random_cases() -> None:
    checks.check_float64(lambda _: Sft(SftSettings()), lambda _, policy, __: checks.nll(policy))

    def over_the_batch(_: float, policy: list, __: list) -> torch.Tensor:
        tokens = torch.tensor([len(p) for p in policy[0::2]])
        return checks.nll(policy) * tokens * len(tokens) / tokens.sum()

    checks.check_float64(lambda _: Sft(SftSettings(average="batch")), over_the_batch)


def test_swap_padding_and_mates() -> None:
    checks.check_swap(Sft(SftSettings()))
    checks.check_padding_and_mates(Sft(SftSettings()))


def test_mates_do_change_the_mean_over_the_batch() -> None:
    with pytest.raises(AssertionError):
        checks.check_padding_and_mates(Sft(SftSettings(average="batch")))


@pytest.mark.parametrize("settings", [{"average": "tokens"}, {"beta": 0.1}])
def test_other_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        SftSettings.model_validate(settings)
