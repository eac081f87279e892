"""Group credit against references written out token by token, and its invariances."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mlalign.credit.group import Settings, group_credit, sequence_advantages, span_term
from mlalign.credit.spans import lay_spans
from tests.credit.trajectories import Rollout, laid, rollouts

K = 5
EPS = 1e-4


def credit(made: list[Rollout], k: int = K, pad: int = 0, **settings):
    spans, mask = laid(made, pad)
    return group_credit(
        Settings(**settings),
        total_R=torch.tensor([r.total for r in made], dtype=torch.float64),
        level_R=torch.tensor([r.level for r in made], dtype=torch.float64),
        spans=spans,
        mask_RT=mask,
        group_size=k,
    )


def groups_of(made: list[Rollout], k: int = K) -> list[list[Rollout]]:
    return [made[i : i + k] for i in range(0, len(made), k)]


def plain(values: list[float]) -> list[float]:
    """GRPO's advantages of one group."""
    mean, std = statistics.fmean(values), statistics.stdev(values)
    return [(v - mean) / (std + EPS) for v in values]


def scores(group: list[Rollout]) -> list[float]:
    return [span[2] for r in group for span in r.spans]


def check(found: Tensor, wanted: list[list[float]]) -> None:
    for row, expected in enumerate(wanted):
        got = found[row].double().tolist()
        assert got[: len(expected)] == pytest.approx(expected, abs=1e-6)
        assert not any(got[len(expected) :]), "padding has no advantage"


def test_span_credit_equals_the_formula():
    made = rollouts(50)
    wanted = []
    for group in groups_of(made):
        std = statistics.stdev(scores(group))
        for rollout, base in zip(group, plain([r.total for r in group]), strict=True):
            z = [0.0] * rollout.length
            for span in rollout.spans:
                for token in rollout.tokens(span):
                    z[token] += span[2] / (std + EPS)
            m = sum(z) / rollout.length
            wanted.append([base + 0.7 * (each - m) for each in z])
    out = credit(made, strength=0.7)
    check(out.advantages_RT, wanted)
    assert out.advantages_RT.dtype == torch.float32
    assert out.metrics["frac_reward_zero_std"] == 0
    assert out.metrics["credit/span_term"] > 0.1


def test_process_supervision_equals_the_formula():
    made = rollouts(50, seed=1)
    wanted = []
    for group in groups_of(made):
        mean, std = statistics.fmean(scores(group)), statistics.stdev(scores(group))
        for rollout, base in zip(group, plain([r.level for r in group]), strict=True):
            steps = [(max(rollout.tokens(s)), (s[2] - mean) / (std + EPS)) for s in rollout.spans]
            wanted.append(
                [base + sum(r for end, r in steps if end >= t) for t in range(rollout.length)]
            )
    check(credit(made, form="process").advantages_RT, wanted)


def test_every_completions_span_term_sums_to_zero():
    spans, mask = laid(rollouts(50, seed=2), pad=3)
    term, _, _ = span_term(spans, mask, K)
    assert term.sum(1).abs().max() < 1e-12
    assert term.abs().max() > 1


def test_strength_zero_and_the_sequence_form_are_the_plain_advantage():
    made = rollouts(50, seed=3)
    wanted = [
        [a] * r.length
        for group in groups_of(made)
        for r, a in zip(group, plain([r.total for r in group]), strict=True)
    ]
    check(credit(made, strength=0.0).advantages_RT, wanted)
    check(credit(made, form="sequence").advantages_RT, wanted)


def test_one_span_over_the_whole_completion_is_the_plain_advantage():
    made = rollouts(50, seed=4)
    for rollout in made:
        rollout.spans = [(0, 3 * (rollout.length - 1), rollout.level, "all")]
        rollout.level = 0.0
    out = credit(made)
    plain_out = credit(made, form="sequence")
    torch.testing.assert_close(out.advantages_RT, plain_out.advantages_RT, atol=1e-6, rtol=0)
    assert out.metrics["credit/span_term"] < 1e-12


def test_credit_moves_to_the_words_that_are_wrong():
    """One false claim of two: its tokens lose what the others of the completion gain."""
    true, false = (0, 6, 0.0, "x"), (9, 12, -1.0, "x")
    made = [Rollout(6, [true, false], 0.0), Rollout(6, [true, (9, 12, 0.0, "x")], 0.0)]
    out = credit(made, k=2)
    bad = out.advantages_RT[0] - out.sequence_R[0]
    # The scores 0, -1, 0, 0 have std 1/2; one of six tokens is at -2.
    assert bad.tolist() == pytest.approx([1 / 3] * 3 + [-5 / 3] + [1 / 3] * 2, abs=1e-3)
    assert out.advantages_RT[1].tolist() == pytest.approx([out.sequence_R[1].item()] * 6)


def test_terms_of_the_whole_answer_move_all_tokens_alike():
    made = rollouts(10, seed=5)
    before = credit(made)
    for rollout in made:
        rollout.level += 3 * rollout.length
    after = credit(made)
    moved = after.advantages_RT - before.advantages_RT
    for row, rollout in enumerate(made):
        own = moved[row, : rollout.length]
        assert own.max() - own.min() < 1e-5
    assert moved.abs().max() > 0.1


@pytest.mark.parametrize("form", ["spans", "process", "sequence"])
def test_neither_padding_nor_batch_mates_matter(form: str):
    made = rollouts(20, seed=6)
    whole = credit(made, form=form, pad=4).advantages_RT
    for start in range(0, 20, K):
        own = credit(made[start : start + K], form=form).advantages_RT
        part = whole[start : start + K]
        torch.testing.assert_close(part[:, : own.shape[1]], own, atol=1e-6, rtol=0)
        assert not part[:, own.shape[1] :].any()


def test_the_order_within_a_group_does_not_matter():
    made = rollouts(K, seed=7)
    there, back = credit(made).advantages_RT, credit(made[::-1]).advantages_RT.flip(0)
    torch.testing.assert_close(there, back, atol=1e-6, rtol=0)


def test_equal_rewards_have_exactly_no_advantage_and_are_counted():
    made = rollouts(2 * K, seed=8)
    for rollout in made[:K]:
        rollout.spans, rollout.level = [], 0.1
    out = credit(made)
    assert not out.advantages_RT[:K].any()
    assert out.advantages_RT[K:].any()
    assert out.metrics["frac_reward_zero_std"] == 0.5


def test_a_group_of_equal_span_scores_borrows_the_batchs_std():
    made = rollouts(2 * K, seed=9, terms=1)
    for rollout in made[:K]:
        rollout.spans = [(0, 3, -1.0, "x")]
    out = credit(made)
    std = statistics.stdev(scores(made))
    first = (out.advantages_RT[0] - out.sequence_R[0]).tolist()
    n = made[0].length
    z = -1 / (std + EPS)
    whole = n == 2
    expected = 0.0 if whole else z - z / n
    assert not whole, "the seed gives a first rollout that the span does not fill"
    assert first[0] == pytest.approx(expected, abs=1e-5)
    assert out.metrics["credit/borrowed_std_groups"] == 0.5
    assert out.metrics["credit/flat_groups"] == 0


@pytest.mark.parametrize("spans", [[], [(0, 3, -1.0, "x")]])
def test_a_batch_of_equal_span_scores_has_no_span_term(spans: list):
    made = rollouts(2 * K, seed=10)
    for rollout in made:
        rollout.spans = list(spans)
    out = credit(made)
    plain_out = credit(made, form="sequence")
    torch.testing.assert_close(out.advantages_RT, plain_out.advantages_RT, atol=0, rtol=0)
    assert torch.isfinite(out.advantages_RT).all()
    assert out.metrics["credit/flat_groups"] == (1 if spans else 0)
    steps = credit(made, form="process")
    assert steps.metrics["credit/flat_groups"] == (1 if spans else 0)
    assert (steps.advantages_RT[:, 0] == steps.sequence_R).all()


def test_a_single_span_in_the_batch_is_no_nan():
    made = rollouts(K, seed=11)
    for rollout in made:
        rollout.spans = []
    made[0].spans = [(0, 3, -1.0, "x")]
    for form in ("spans", "process"):
        assert torch.isfinite(credit(made, form=form).advantages_RT).all()


def test_an_empty_completion_takes_part_in_its_group():
    """A row of which no token is real: its reward counts, nothing of it is trained on."""
    mask = torch.tensor([[True, True], [False, False]])
    out = group_credit(
        Settings(),
        total_R=torch.tensor([1.0, 3.0]),
        level_R=torch.tensor([1.0, 3.0]),
        spans=lay_spans([[], []], [[(0, 1), (1, 1)], []], 2),
        mask_RT=mask,
        group_size=2,
    )
    a = 1 / (math.sqrt(2) + EPS)
    assert out.advantages_RT.tolist() == [[pytest.approx(-a)] * 2, [0, 0]]
    assert out.sequence_R.tolist() == pytest.approx([-a, a])


def test_sums_over_processes_stand_for_the_batch():
    """Two processes of two groups each, against one with all four."""
    rewards = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for options in (
        {"scale": "batch"},
        {"scale": "batch", "baseline": "leave_one_out"},
    ):
        whole = sequence_advantages(rewards, 2, **options)
        parts = _as_two_processes(rewards, options)
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=0)


class Beside:
    """Adds what the other process said at the same call, and keeps what this one says."""

    def __init__(self, other: list[Tensor]) -> None:
        self.other = other
        self.said: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        number = len(self.said)
        self.said.append(tensor)
        return tensor + (self.other[number] if number < len(self.other) else 0)


def _as_two_processes(rewards: Tensor, options: dict) -> list[Tensor]:
    """Each half alone, with what the other half says: run until they agree, once per reduction."""
    told: list[list[Tensor]] = [[], []]
    out: list[Tensor] = []
    for _ in range(3):
        lines = [Beside(told[1]), Beside(told[0])]
        out = [
            sequence_advantages(own, 2, reduce=line, **options)
            for own, line in zip(rewards.chunk(2), lines, strict=True)
        ]
        told = [line.said for line in lines]
    return out


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="7 rows are no whole groups of 2"):
        sequence_advantages(torch.zeros(7), 2)
    with pytest.raises(ValueError, match="a group of 1"):
        sequence_advantages(torch.zeros(7), 1)
    with pytest.raises(ValueError, match="row 2: a reward of nan"):
        sequence_advantages(torch.tensor([0.0, 1.0, math.nan, 1.0]), 2)
    with pytest.raises(ValidationError, match="leave_one_out"):
        Settings(baseline="leave_one_out")
