"""The weighted sum: its parts add up, and every term can be read."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from mlalign import methods
from mlalign.records import ObjectFact
from mlalign.rewards._combine import Rewards, Term, TermSpan, build, columns, summary
from mlalign.rewards._reward import RewardError, RewardUnavailable, Scored
from tests.rewards.answers import context, example, said

CHOSEN = [
    ("object_checker", 2.0, {}),
    ("coverage", 0.5, {}),
    ("no_stop", 1.0, {"penalty": 4.0}),
]


def test_by_hand():
    there = example(objects=(ObjectFact(name="dog"), ObjectFact(name="cat")))
    rewards = build(CHOSEN, context())
    group = [said("a dog and a bus", there), said("", there, stopped=False, sample=1)]
    first, second = rewards.score_group(group)
    assert first.id == "e#0"
    assert first.spans == (
        TermSpan(2, 5, 0, "object_checker"),
        TermSpan(12, 15, -2, "object_checker"),
    )
    assert (first.level, first.total) == (0.25, -1.75)
    assert first.terms == {"object_checker": -1, "coverage": 0.5, "no_stop": 0}
    assert first.counts["object_checker/false"] == 1
    assert (second.id, second.spans, second.total) == ("e#1", (), -4)


class Random:
    """Spans over words, at random."""

    spans = True

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def __call__(self, completions: Any) -> list[Scored]:
        return [
            Scored.of(
                [
                    (a, b, self.rng.gauss(0, 1))
                    for a, b in c.offsets
                    if a < b and self.rng.random() < 0.5
                ]
            )
            for c in completions
        ]


class Whole:
    """A number for the whole answer."""

    spans = False

    def __call__(self, completions: Any) -> list[Scored]:
        return [Scored(total=len(c.text) / 7) for c in completions]


def test_raw_span_scores_and_the_level_sum_to_the_sequence_reward():
    terms = [Term("one", 0.3, Random(0)), Term("two", -1.7, Random(1)), Term("all", 0.9, Whole())]
    answers = [said("word " * n) for n in range(20)]
    for combined, answer in zip(Rewards(terms).score_group(answers), answers, strict=True):
        spans = math.fsum(span.score for span in combined.spans)
        assert combined.total == pytest.approx(combined.level + spans, abs=1e-12)
        weighted = {t.name: t.weight * combined.terms[t.name] for t in terms}
        assert combined.total == pytest.approx(sum(weighted.values()), abs=1e-12)
        assert combined.level == pytest.approx(0.9 * len(answer.text) / 7)
        assert {s.term for s in combined.spans} <= {"one", "two"}


def test_every_term_is_logged_under_trls_names():
    rewards = build([("no_stop", 0.5, {}), ("length_penalty", 1.0, {})], context())
    combined = rewards.score_group([said("a dog"), said("a dog", stopped=False)])
    table = columns(combined)
    assert table["reward"] == pytest.approx([-30 / 896, -4 - 20 / 896])
    assert table["rewards/no_stop"] == [0, -8]
    logged = summary(table)
    assert logged["rewards/no_stop/mean"] == -4
    assert logged["rewards/no_stop/std"] == pytest.approx(8 / math.sqrt(2))
    assert logged["rewards/no_stop/cut"] == 0.5
    assert logged["rewards/length_penalty/tokens"] == 2.5
    assert logged["reward"] == pytest.approx(-2 - 25 / 896)
    assert set(logged) == {
        "reward", "reward_std", "reward/level", "rewards/no_stop/mean", "rewards/no_stop/std",
        "rewards/no_stop/cut", "rewards/length_penalty/mean", "rewards/length_penalty/std",
        "rewards/length_penalty/tokens",
    }  # fmt: skip


def test_all_rewards_can_be_built_and_score_an_empty_answer_that_never_ends():
    class Judge:
        def ask_many(self, examples: Any, questions: Any) -> Any:
            return [[] for _ in examples]

    lent = context(judge=Judge(), score=lambda queries: [[0.0] * len(q.spans) for q in queries])
    extra = {"format": {"pattern": ".+"}}
    named = [(n, 1.0, extra.get(n, {})) for n in methods.names("mlalign.rewards")]
    assert len(named) >= 8
    (out,) = build(named, lent).score_group([said("", stopped=False)])
    assert out.spans == ()
    assert out.total == pytest.approx(-8 - 10 / 896 - 1)


def test_bad_terms_are_named():
    with pytest.raises(ValueError, match="no reward: name at least one"):
        Rewards([])
    with pytest.raises(ValueError, match="reward no_stop is given twice"):
        build([("no_stop", 1.0, {}), ("no_stop", 2.0, {})], context())
    with pytest.raises(ValueError, match="reward no_stop: a weight of nan"):
        build([("no_stop", math.nan, {})], context())
    with pytest.raises(methods.UnknownMethod, match="Did you mean 'coverage'"):
        build([("coverge", 1.0, {})], context())


def test_a_fault_of_one_term_stops_the_sum():
    class Bad(Whole):
        def __call__(self, completions: Any) -> list[Scored]:
            return [Scored(total=math.nan) for _ in completions]

    class Down(Whole):
        def __call__(self, completions: Any) -> list[Scored]:
            raise ConnectionError("gone")

    with pytest.raises(RewardError, match="reward bad, record 'e#0'"):
        Rewards([Term("all", 1, Whole()), Term("bad", 0.0, Bad())]).score_group([said("a")])
    with pytest.raises(RewardUnavailable, match="reward down cannot be reached: gone"):
        Rewards([Term("down", 1, Down())]).score_group([said("a")])
