"""The weighted list: sums, closed forms, metrics, and what a recipe may get wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mlalign.objectives.dpo import Dpo, DpoSettings
from mlalign.objectives.dpo_sft import DpoSft, DpoSftSettings
from mlalign.objectives.ipo import Ipo, IpoSettings
from mlalign.objectives.mpo import Mpo, MpoSettings
from mlalign.recipe import MethodRef, RecipeError, configure
from tests.objectives import checks


def test_the_published_one_by_hand() -> None:
    out = checks.by_hand(Mpo(MpoSettings()))
    bco = 0.5981388693815918 + 0.6443966600735709
    expected = 0.8 * 0.5543552444685271 + 0.2 * bco + 1.0
    assert out.per_pair_N.item() == pytest.approx(expected, abs=1e-6)
    losses = {name: value.item() for name, value in out.metrics.items()}
    assert losses == pytest.approx(
        {"loss/dpo": 0.5543552444685271, "loss/bco_pair": bco, "loss/sft": 1.0}, abs=1e-6
    )
    assert expected == pytest.approx(1.691991, abs=1e-6)
    checks.check_rewards(Mpo(MpoSettings()), 0.1)


def test_at_the_reference_it_is_the_weighted_sum_of_the_parts() -> None:
    parts = _mpo(
        {"name": "dpo", "weight": 0.5},
        {"name": "ipo", "weight": 0.1, "beta": 0.5},
        {"name": "hinge", "weight": 2.0},
        {"name": "bco_pair", "weight": 0.25},
    )
    checks.check_at_reference(parts, 0.5 * math.log(2) + 0.1 + 2.0 + 0.5 * math.log(2))


def test_no_closed_form_where_a_part_has_none() -> None:
    assert Mpo(MpoSettings()).at_reference is None


def test_each_part_has_its_own_settings_and_metrics() -> None:
    out = checks.by_hand(
        _mpo(
            {"name": "ipo", "weight": 0.5, "beta": 0.25},
            {"name": "dpo_mean", "weight": 1.0, "beta": 0.3},
        )
    )
    assert out.per_pair_N.item() == pytest.approx(0.5 + 0.5543552444685271, abs=1e-6)
    assert out.margins_N.item() == pytest.approx(0.75), "of the first part, at its beta"
    assert set(out.metrics) == {
        "loss/ipo",
        "logratios/per_token_margins/ipo",
        "loss/dpo_mean",
        "logratios/per_token_margins/dpo_mean",
    }


def test_one_part_of_weight_1_is_that_objective() -> None:
    alone = checks.by_hand(Ipo(IpoSettings(beta=0.2)))
    part = checks.by_hand(_mpo({"name": "ipo", "weight": 1, "beta": 0.2}))
    for name in ("per_pair_N", "margins_N", "chosen_rewards_N", "rejected_rewards_N"):
        torch.testing.assert_close(getattr(part, name), getattr(alone, name), atol=0, rtol=0)


def test_dpo_and_sft_are_dpo_sft() -> None:
    parts = _mpo({"name": "dpo", "weight": 1, "beta": 0.3}, {"name": "sft", "weight": 0.7})
    whole = DpoSft(DpoSftSettings(beta=0.3, sft_weight=0.7))
    torch.testing.assert_close(checks.by_hand(parts).per_pair_N, checks.by_hand(whole).per_pair_N)


def test_a_part_of_another_package() -> None:
    outside = checks.by_hand(_mpo({"name": "mlalign.objectives.dpo:Dpo", "weight": 2.0}))
    inside = checks.by_hand(Dpo(DpoSettings()))
    torch.testing.assert_close(outside.per_pair_N, 2 * inside.per_pair_N)


def test_against_float64_on_random_cases() -> None:
    def formula(beta: float, policy: list, reference: list) -> torch.Tensor:
        chosen, rejected = checks.summed(policy, reference)
        dpo = checks.softplus(-beta * (chosen - rejected))
        bco = checks.softplus(-0.3 * chosen) + checks.softplus(0.3 * rejected)
        return 0.8 * dpo + 0.2 * bco + checks.nll(policy)

    def made(beta: float) -> Mpo:
        return _mpo(
            {"name": "dpo", "weight": 0.8, "beta": beta},
            {"name": "bco_pair", "weight": 0.2, "beta": 0.3},
            {"name": "sft", "weight": 1.0},
        )

    checks.check_float64(made, formula)


def test_swap_padding_and_mates() -> None:
    checks.check_swap(Mpo(MpoSettings()))
    checks.check_padding_and_mates(Mpo(MpoSettings()))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"name": "dpoo", "weight": 1}, "Did you mean 'dpo'"),
        ({"name": "mpo", "weight": 1}, "cannot be a part of itself"),
        ({"name": "dpo"}, r"parts\.0\.weight: Field required"),
        ({"name": "dpo", "weight": 0}, r"parts\.0\.weight"),
        ({"name": "dpo", "weight": float("nan")}, r"parts\.0\.weight"),
        ({"name": "dpo", "weight": 1, "beta": -0.1}, "part 'dpo': beta: Input should be greater"),
        ({"name": "dpo", "weight": 1, "betta": 0.1}, "part 'dpo': betta: .*Its settings are: beta"),
        ({"name": "dpo_mean", "weight": 1}, "part 'dpo_mean': beta: Field required"),
        ({"name": "sft", "weight": 1, "beta": 0.1}, "part 'sft': beta: .*settings are: average"),
    ],
)
def test_a_faulty_part_is_named_with_its_key(part: dict, message: str) -> None:
    ref = MethodRef.model_validate({"name": "mpo", "parts": [part]})
    with pytest.raises(RecipeError, match=message):
        configure(Mpo, ref, "train.objective")


@pytest.mark.parametrize("parts", [[], [{"name": "dpo", "weight": 1}] * 2])
def test_no_parts_and_a_part_twice_are_refused(parts: list) -> None:
    with pytest.raises(ValidationError, match=r"parts(.|\n)*(at least 1|listed twice: dpo)"):
        MpoSettings.model_validate({"parts": parts})


def _mpo(*parts: dict[str, Any]) -> Mpo:
    return Mpo(MpoSettings.model_validate({"parts": parts}))
