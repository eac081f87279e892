"""mDPO and POVID: by hand, in float64, and what they ask for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mlalign.branching.batch import ObjectiveOut, TokenLogps
from mlalign.objectives.mdpo import Mdpo, MdpoSettings
from mlalign.objectives.mpo import METHOD as Mpo
from mlalign.objectives.povid import Povid, PovidSettings
from tests.objectives import checks

VIEW_POLICY, VIEW_REFERENCE = [-1.0, -1.5, -2.0, -0.5], [-1.5, -1.5, -2.0, -0.5]
"""Of the pair's chosen answer; log-ratio 0.5."""


def mdpo(**settings: object) -> Mdpo:
    return Mdpo(MdpoSettings.model_validate(settings))


def povid(**settings: object) -> Povid:
    return Povid(PovidSettings.model_validate(settings))


def with_view(logps: TokenLogps, rows: list[list[float]], name: str) -> TokenLogps:
    return replace(logps, views={name: checks.logps(rows)})


class Halved:
    """The objective with a view made of each pair's chosen log-probs, for the shared checks."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.at_reference = inner.at_reference

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        name = self.inner.views[0].name
        seen = [
            replace(
                each,
                views={
                    name: TokenLogps(
                        logps_CS=0.5 * each.logps_CS[0::2],
                        mask_CS=each.mask_CS[0::2],
                        entropy_CS=each.entropy_CS[0::2],
                        top1_CS=each.top1_CS[0::2],
                        mean_logit_CS=each.mean_logit_CS[0::2],
                    )
                },
            )
            for each in (policy, reference)
        ]
        return self.inner(*seen)


def both(name: str) -> tuple[TokenLogps, TokenLogps]:
    return (
        with_view(checks.logps(checks.POLICY), [VIEW_POLICY], name),
        with_view(checks.logps(checks.REFERENCE), [VIEW_REFERENCE], name),
    )


def test_mdpo_by_hand() -> None:
    out = mdpo()(*both("other_image"))
    assert out.per_pair_N.item() == pytest.approx(0.554355 + 0.620957 + 0.598139, abs=2e-6)
    assert out.metrics["loss/conditional"] == pytest.approx(0.620957, abs=1e-6)
    assert out.metrics["rewards/image_margins"] == pytest.approx(0.15, abs=1e-6)
    raised = mdpo(anchor=1.0)(*both("other_image"))
    assert raised.metrics["loss/anchored"] == pytest.approx(math.log1p(math.exp(0.8)), abs=1e-6)


def test_povid_by_hand() -> None:
    one = povid()(*both("noisy")).per_pair_N.item()
    assert one == pytest.approx(0.586962, abs=1e-6)
    two = povid(form="two")(*both("noisy")).per_pair_N.item()
    assert two == pytest.approx((0.620957 + 0.554355) / 2, abs=1e-6)


@pytest.mark.parametrize("name", ["mdpo", "one", "two"])
def test_sixty_random_batches_in_float64(name: str) -> None:
    generator = torch.Generator().manual_seed(5)

    def rows(lengths: list[int]) -> list[list[float]]:
        return [(-3 * torch.rand(n, generator=generator)).tolist() for n in lengths]

    def ratio(p: list[float], r: list[float]) -> float:
        return math.fsum(a - b for a, b in zip(p, r, strict=True))

    def soft(x: float) -> float:
        return math.log1p(math.exp(-x))

    view = "other_image" if name == "mdpo" else "noisy"
    for _ in range(60):
        lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
        p, r = rows(lengths), rows(lengths)
        vp, vr = rows(lengths[0::2]), rows(lengths[0::2])
        beta, a, b, c = (torch.rand(4, generator=generator) + 0.05).tolist()
        if name == "mdpo":
            objective: Any = mdpo(beta=beta, anchor=a)
        else:
            weights = {"weight_chosen": a, "weight_text": b, "weight_noise": c}
            objective = povid(beta=beta, form=name, **(weights if name == "one" else {}))
        out = objective(with_view(checks.logps(p), vp, view), with_view(checks.logps(r), vr, view))
        for pair in range(3):
            w, l_ = ratio(p[2 * pair], r[2 * pair]), ratio(p[2 * pair + 1], r[2 * pair + 1])
            v = ratio(vp[pair], vr[pair])
            expected = {
                "mdpo": soft(beta * (w - l_)) + soft(beta * (w - v)) + soft(beta * w - a),
                "one": soft(beta * (a * w - b * l_ - c * v)),
                "two": (soft(beta * (w - v)) + soft(beta * (w - l_))) / 2,
            }[name]
            assert out.per_pair_N[pair].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "at_reference"),
    [(mdpo(), 3 * math.log(2)), (povid(), math.log(2)), (povid(form="two"), math.log(2))],
)
def test_shared_checks(objective: Any, at_reference: float) -> None:
    checks.check_at_reference(Halved(objective), at_reference)
    checks.check_padding_and_mates(Halved(objective))
    checks.check_swap(Halved(objective))
    checks.check_rewards(Halved(objective), 0.1)


def test_an_anchor_moves_the_closed_form() -> None:
    objective = Halved(mdpo(anchor=2.0))
    checks.check_at_reference(objective, 2 * math.log(2) + math.log1p(math.exp(2.0)))


def test_what_they_ask_for() -> None:
    (view,) = mdpo(area_min=0.05, image="crop").views
    assert view.scores == "chosen" and dict(view.settings)["area_min"] == 0.05
    (view,) = povid(noise_step=800, reference_tokens="policy").views
    assert (view.scores, view.whose) == ("argmax", "policy")
    assert dict(view.settings) == {"step": 800.0, "wrap": 0.0}
    summed = Mpo(
        Mpo.Settings.model_validate(
            {"parts": [{"name": "mdpo", "weight": 1}, {"name": "ddpo", "weight": 0.5}]}
        )
    )
    assert [view.name for view in summed.views] == ["other_image"] and summed.edits


def test_refusals() -> None:
    for objective, name in ((mdpo(), "other_image"), (povid(), "noisy")):
        with pytest.raises(ValueError, match=name):
            checks.by_hand(objective)
    for wrong in ({"beta": -0.1}, {"area_min": 0.5, "area_max": 0.1}, {"noise_step": 1000}):
        with pytest.raises(ValidationError):
            MdpoSettings.model_validate(wrong)
    with pytest.raises(ValidationError):
        PovidSettings.model_validate({"beta": 0})
