"""Dense DPO: by hand, in float64, as DPO where nothing is weighed, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from pydantic import ValidationError

from mlalign.branching.batch import ObjectiveOut, TokenLogps
from mlalign.objectives.ddpo import Ddpo, DdpoSettings
from mlalign.objectives.dpo import Dpo, DpoSettings
from mlalign.objectives.dpo_mean import METHOD as DpoMean
from tests.objectives import checks


def ddpo(**settings: object) -> Ddpo:
    return Ddpo(DdpoSettings.model_validate(settings))


def with_edits(logps: TokenLogps, rows: list[list[float]]) -> TokenLogps:
    """Segment weights at the first tokens of each completion; junk stands under the padding."""
    edited = torch.full(logps.mask_CS.shape, 7.0)
    for out, row in zip(edited, rows, strict=True):
        out[: len(row)] = torch.tensor(row)
    return replace(logps, edited_CS=edited)


class Everywhere:
    """The objective with the second token of every completion corrected, for the shared checks."""

    def __init__(self, inner: Ddpo) -> None:
        self.inner = inner
        self.at_reference = inner.at_reference

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        edited = torch.zeros(policy.mask_CS.shape)
        edited[:, 1] = 1.0
        return self.inner(replace(policy, edited_CS=edited), reference)


def test_by_hand() -> None:
    policy = with_edits(checks.logps([[-1.0, -0.8], [-3.0]]), [[0, 1], [0]])
    out = ddpo(beta=0.5, gamma=5)(policy, checks.logps([[-2.0, -1.0], [-2.0]]))
    assert out.per_pair_N.item() == pytest.approx(0.414370, abs=1e-6)
    assert out.margins_N.item() == pytest.approx(0.5 * (1.2 + 1.0)), "rewards are TRL's: sums"
    assert out.metrics["ddpo/corrected_share"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("average", [True, False])
def test_fifty_random_batches_in_float64(average: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.rand, generator=generator, dtype=torch.float64)
    corrected = 0
    for _ in range(60):
        lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
        beta, gamma = float(draw(())) + 0.05, 6 * float(draw(())) + 0.2
        policy = [-3 * draw(n) for n in lengths]
        reference = [-3 * draw(n) for n in lengths]
        weights = [(draw(n) < 0.4) * (draw(n) + 0.5) for n in lengths]
        corrected += sum(int((w > 0).sum()) for w in weights)
        out = ddpo(beta=beta, gamma=gamma, average=average)(
            with_edits(checks.logps([v.tolist() for v in policy]), [w.tolist() for w in weights]),
            checks.logps([v.tolist() for v in reference]),
        )
        scores = []
        for p, r, w in zip(policy, reference, weights, strict=True):
            terms, total = 0.0, 0.0
            for token in range(len(p)):
                factor = gamma * float(w[token]) if w[token] > 0 else 1.0
                terms += factor * float(p[token] - r[token])
                total += factor
            scores.append(terms / total if average else terms)
        expected = [
            math.log1p(math.exp(-beta * (scores[i] - scores[i + 1]))) for i in range(0, 6, 2)
        ]
        assert out.per_pair_N.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert corrected > 300


def test_nothing_weighed_is_dpo() -> None:
    policy, reference = checks.logps(checks.POLICY), checks.logps(checks.REFERENCE)
    weighed = with_edits(policy, [[1, 0, 1, 0], [0, 1]])
    plain = Dpo(DpoSettings(beta=0.2))(policy, reference)
    found = ddpo(beta=0.2, gamma=1, average=False)(weighed, reference)
    assert torch.equal(found.per_pair_N, plain.per_pair_N)
    mean = DpoMean(DpoMean.Settings(beta=0.2))(policy, reference)
    found = ddpo(beta=0.2, gamma=1)(weighed, reference)
    torch.testing.assert_close(found.per_pair_N, mean.per_pair_N)
    other = ddpo(beta=0.2, gamma=5, average=False)(weighed, reference)
    assert abs(other.per_pair_N.item() - plain.per_pair_N.item()) > 0.01


@pytest.mark.parametrize("average", [True, False])
def test_shared_checks(average: bool) -> None:
    objective = Everywhere(ddpo(beta=0.3, gamma=3, average=average))
    checks.check_at_reference(objective, math.log(2))
    checks.check_padding_and_mates(objective)
    checks.check_swap(objective)
    checks.check_rewards(objective, 0.3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="edited_CS"):
        checks.by_hand(ddpo())
    for wrong in ({"beta": 0}, {"gamma": 0}, {"gama": 2}):
        with pytest.raises(ValidationError):
            DdpoSettings.model_validate(wrong)
