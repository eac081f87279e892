"""What a reward may give, and what it is told where it gives something else."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlalign.judges._faults import ServerDown, ServerError
from mlalign.records import RecordError
from mlalign.rewards._reward import (
    RewardError,
    RewardUnavailable,
    Scored,
    SpanScore,
    checked,
)
from tests.rewards.answers import example, said


class Gives:
    """A reward that gives what it was told to."""

    def __init__(self, *scored: Scored, spans: bool = True) -> None:
        self.scored = list(scored)
        self.spans = spans

    def __call__(self, completions: Any) -> list[Scored]:
        return self.scored


def refusal(scored: Scored, spans: bool = True) -> str:
    with pytest.raises(RewardError) as error:
        checked("mine", Gives(scored, spans=spans), [said("a dog runs", sample=3)])
    assert error.value.reward == "mine"
    assert error.value.record == "e#3"
    return str(error.value)


def test_spans_come_out_in_text_order_with_their_sum():
    given = Scored.of([(6, 10, -1.0), (2, 5, 0.25)], {"n": 2})
    (out,) = checked("mine", Gives(given), [said("a dog runs")])
    assert out.spans == (SpanScore(2, 5, 0.25), SpanScore(6, 10, -1.0))
    assert out.total == -0.75
    assert out.counts == {"n": 2}


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_names_reward_and_record(score: float):
    assert "reward mine, record 'e#3': a score of" in refusal(Scored.of([(2, 5, score)]))
    assert "a score of" in refusal(Scored(total=score), spans=False)


@pytest.mark.parametrize(("number", "wanted"), [(0, 1), (1, 2), (3, 2)])
def test_another_number_of_scores_than_completions(number: int, wanted: int):
    with pytest.raises(RewardError, match=rf"gave {number} scores for {wanted} completions"):
        checked("mine", Gives(*[Scored()] * number), [said("a dog")] * wanted)


def test_spans_outside_empty_overlapping_or_blank():
    assert "span 6:11 is outside the answer of 10 characters" in refusal(Scored.of([(6, 11, 1.0)]))
    assert "span -1:2 is outside" in refusal(Scored.of([(-1, 2, 1.0)]))
    assert "span 4:4 is outside" in refusal(Scored.of([(4, 4, 1.0)]))
    assert "span 4:6 overlaps" in refusal(Scored.of([(2, 5, 1.0), (4, 6, 1.0)]))
    assert "span 5:6 holds nothing but blanks" in refusal(Scored.of([(5, 6, 1.0)]))


def test_a_total_that_is_not_the_sum_and_spans_of_a_whole_reward():
    spans = (SpanScore(2, 5, 1.0),)
    assert "total 2, but its spans sum to 1" in refusal(Scored(spans=spans, total=2.0))
    assert "spans = True" in refusal(Scored(spans=spans, total=1.0), spans=False)


def test_a_total_may_differ_by_rounding():
    spans = tuple(SpanScore(i, i + 1, 0.1) for i in range(3))
    (out,) = checked("mine", Gives(Scored(spans=spans, total=0.1 + 0.1 + 0.1)), [said("abc")])
    assert out.total == math.fsum([0.1, 0.1, 0.1])


def test_touching_spans_are_two():
    (out,) = checked("mine", Gives(Scored.of([(0, 2, 1.0), (2, 4, 2.0)])), [said("abcd")])
    assert out.total == 3.0


@pytest.mark.parametrize("error", [ServerDown("no server"), ConnectionError("x"), TimeoutError()])
def test_what_is_down_can_be_asked_again(error: Exception):
    calls = []

    class Flaky:
        spans = False

        def __call__(self, completions: Any) -> list[Scored]:
            calls.append(len(completions))
            if len(calls) == 1:
                raise error
            return [Scored(total=1.0) for _ in completions]

    reward = Flaky()
    with pytest.raises(RewardUnavailable, match="reward mine cannot be reached") as caught:
        checked("mine", reward, [said("a dog")])
    assert caught.value.reward == "mine"
    assert caught.value.__cause__ is error
    assert checked("mine", reward, [said("a dog")]) == [Scored(total=1.0)]


def test_what_a_server_refuses_is_an_error_of_its_own():
    class Refused:
        spans = False

        def __call__(self, completions: Any) -> list[Scored]:
            raise ServerError("HTTP 401. To mend it: set the key")

    with pytest.raises(RewardError, match=r"reward mine, record 'e#0': .*401.*set the key"):
        checked("mine", Refused(), [said("a dog")])


def test_other_faults_are_not_taken_for_a_server_that_is_down():
    class Broken:
        spans = False

        def __call__(self, completions: Any) -> list[Scored]:
            raise KeyError("x")

    with pytest.raises(KeyError):
        checked("mine", Broken(), [said("a dog")])


def test_nothing_to_score():
    assert checked("mine", Gives(), []) == []


@pytest.mark.parametrize(
    ("ids", "offsets", "problem"),
    [
        ((), (), "token_ids: a completion without a token"),
        ((1, 2), ((0, 1),), "offsets: 1 for 2 tokens"),
        ((1,), ((0, 3),), "outside the answer of 2 characters"),
        ((1,), ((1, 0),), "outside the answer"),
        ((1, 2), ((1, 2), (0, 1)), "not in the order"),
    ],
)
def test_a_completion_says_what_its_tokens_spell(ids: Any, offsets: Any, problem: str):
    from mlalign.rewards._reward import Completion

    with pytest.raises(RecordError, match=problem):
        Completion(example=example("r"), text="ab", token_ids=ids, offsets=offsets, stopped=True)
