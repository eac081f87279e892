"""Claim judge (RLAIF-V's divide and conquer, Yu et al., 2405.17220, section 3, as a reward).

The answer is split into claims, each asked of a judge as a yes/no question about the image:

    score(claim) = ``wrong`` where p_no > p_yes, else ``right``     its span: the words that say it
    reward       = sum over claims

The defaults are RLAIF-V's: 0 for a claim that holds, -1 for one that does not. ``graded`` puts
p_yes / (p_yes + p_no) between the two instead. All questions about one image are asked together, so
that they branch from one prefix, and equal ones once. An answer without a claim gets 0, the best
there is: add ``coverage``, or silence wins.

An undecided claim (the judge does not know) gets ``undecided`` and is counted; it is never a guess.
A question that a server failed to answer is no verdict, and nor is a server that is down:
RewardUnavailable, and the same completions are scored again later. Where the judge does answer and
still leaves more than ``max_undecided`` of a call undecided, waiting mends nothing: RewardError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mlalign.judges import Answer
from mlalign.records import Example
from mlalign.rewards._claims import Language, splitter
from mlalign.rewards._reward import (
    Completion,
    RewardContext,
    RewardError,
    RewardUnavailable,
    Scored,
    SpanScore,
)


class Settings(BaseModel):
    """How claims are found and scored."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    language: Language = "english"
    """How the answer is split where the run brings no splitter of its own."""
    right: float = 0.0
    """Score of a claim that the judge affirms."""
    wrong: float = -1.0
    """Score of a claim that it rejects."""
    undecided: float = 0.0
    """Score of a claim that it does not know."""
    graded: bool = False
    """Between false and true by the judge's probabilities, not by its verdict."""
    max_undecided: float = Field(default=1.0, ge=0, le=1)
    """Greatest share of the questions of one call that the judge may leave undecided."""
    max_failed: float = Field(default=0.0, ge=0, le=1)
    """Greatest share of them that may get no answer from the judge's server; up to it they count as
    undecided."""


class ClaimJudge:
    """The reward. ``context.judge`` answers; ``context.split`` or the language's rules divide."""

    Settings = Settings
    spans = True

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        if context.judge is None:
            raise ValueError("reward claim_judge has no judge: name one of mlalign/judges")
        self.settings = settings
        self.judge = context.judge
        self.split = context.split or splitter(settings.language, context.vocabulary)

    def __call__(self, completions: Sequence[Completion]) -> list[Scored]:
        """Claims that share characters become one span with the sum of their scores.

        Raises RewardError, naming the record, where the judge gives another number of answers than
        it was asked questions, or decides too few; RewardUnavailable where too many got no answer.
        Counts: claims, rejected, undecided.
        """
        stated = [self.split(c.text) for c in completions]
        asked: dict[str, dict[str, None]] = {}
        examples: dict[str, Example] = {}
        for completion, claims in zip(completions, stated, strict=True):
            examples[completion.example.id] = completion.example
            questions = asked.setdefault(completion.example.id, {})
            questions.update(dict.fromkeys(claim.question for claim in claims))
        told = self.judge.ask_many(list(examples.values()), [list(q) for q in asked.values()])
        answers = _by_question(asked, told)
        self._look_for_illness(answers)
        return [
            self._scored(claims, answers[completion.example.id])
            for completion, claims in zip(completions, stated, strict=True)
        ]

    def _look_for_illness(self, told: dict[str, dict[str, Answer]]) -> None:
        answers = [answer for each in told.values() for answer in each.values()]
        failed = [answer.failure for answer in answers if answer.failure]
        if len(failed) > self.settings.max_failed * len(answers):
            problem = (
                f"its judge gave no answer to {len(failed)} of {len(answers)} questions, "
                f"the first: {failed[0]}"
            )
            raise RewardUnavailable("claim_judge", ConnectionError(problem))
        undecided = sum(not answer.decided and not answer.failure for answer in answers)
        if undecided > self.settings.max_undecided * len(answers):
            problem = f"the judge left {undecided} of {len(answers)} questions undecided"
            mend = (
                "See how it answers (judge.yes, judge.no, judge.template); max_undecided bears it"
            )
            raise RewardError("claim_judge", ", ".join(told), problem, mend)

    def _scored(self, claims: Sequence[Any], answers: dict[str, Answer]) -> Scored:
        given = [answers[claim.question] for claim in claims]
        spans = [
            SpanScore(claim.start, claim.end, self._score(answer))
            for claim, answer in zip(claims, given, strict=True)
        ]
        counts = {
            "claims": float(len(given)),
            "rejected": float(sum(answer.verdict is False for answer in given)),
            "undecided": float(sum(not answer.decided for answer in given)),
        }
        return Scored.of(merged(spans), counts)

    def _score(self, answer: Answer) -> float:
        low, high = self.settings.wrong, self.settings.right
        if not answer.decided:
            return self.settings.undecided
        if self.settings.graded and answer.p_yes + answer.p_no > 0:
            return low + (high - low) * answer.p_yes / (answer.p_yes + answer.p_no)
        return high if answer.verdict else low


def merged(spans: Sequence[SpanScore]) -> list[SpanScore]:
    """In text order, those that share characters as one span with the sum of their scores."""
    out: list[SpanScore] = []
    for span in sorted(spans):
        if out and span.start < out[-1].end:
            start, end, score = out[-1]
            out[-1] = SpanScore(start, max(end, span.end), score + span.score)
        else:
            out.append(span)
    return out


def _by_question(
    asked: dict[str, dict[str, None]], told: Sequence[Sequence[Answer]]
) -> dict[str, dict[str, Answer]]:
    """Answers by record id and question."""
    if len(told) > len(asked):
        problem = f"the judge gave answers for {len(told)} images of {len(asked)}"
        raise RewardError("claim_judge", ", ".join(asked), problem, "Mend the judge: one list each")
    given = {record: tuple(answers) for record, answers in zip(asked, told, strict=False)}
    for record, questions in asked.items():
        answers = given.get(record, ())
        if len(answers) != len(questions):
            problem = f"the judge gave {len(answers)} answers to {len(questions)} questions"
            raise RewardError("claim_judge", record, problem, "Mend the judge: one each, in order")
    return {record: dict(zip(asked[record], given[record], strict=True)) for record in asked}


METHOD = ClaimJudge
