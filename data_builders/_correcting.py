"""Finding what is wrong in a model's answer and correcting it: HA-DPO's and RLHF-V's first half."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_builders._context import BuildContext
from data_builders._jobs import Check, Correct, Failed, Job, Split, Work, in_step
from data_builders._judging import facts_judge
from data_builders._language import Statement
from mlalign.judges import Answer
from mlalign.records import Example, Skip

NO_STATEMENT = "the description states nothing that can be checked"
NOTHING_WRONG = "nothing wrong in the description"
NOT_CORRECTABLE = "the description cannot be corrected"
STILL_WRONG = "the corrected description is still wrong"
EMPTY = "the model's description is empty"

EXPECTED = frozenset({NOTHING_WRONG, NOT_CORRECTABLE, STILL_WRONG})
"""Reasons that belong to the method."""


class Desk:
    """Who says what is true, and who does the language work.

    True is what the run's judge says; without one, what the writer reads in the facts; without a
    writer, what the planted facts say.
    """

    def __init__(self, context: BuildContext) -> None:
        self.scribe = context.scribe()
        by_facts = context.judge is None and context.writer is None
        self.judge = facts_judge(context) if by_facts else context.judge

    def together(self, works: Sequence[Work[Any]]) -> list[Any]:
        """The results of works, run in step."""
        return in_step(works, self.do)

    def do(self, jobs: Sequence[Job]) -> list[Any]:
        """The result of each job, in order, or ``Failed``."""
        asked = [j for j in jobs if isinstance(j, Check) and self.judge is not None]
        checked = iter(self._judged(asked))
        others = [j for j in jobs if not (isinstance(j, Check) and self.judge is not None)]
        done = iter(self.scribe.do(others) if others else [])
        return [
            next(checked) if isinstance(j, Check) and self.judge is not None else next(done)
            for j in jobs
        ]

    def _judged(self, jobs: Sequence[Check]) -> list[dict[str, Answer]]:
        if not jobs:
            return []
        assert self.judge is not None
        asked = [list(dict.fromkeys(job.questions)) for job in jobs]
        answers = self.judge.ask_many([job.example for job in jobs], asked)
        return [dict(zip(a, b, strict=True)) for a, b in zip(asked, answers, strict=True)]


@dataclass(frozen=True)
class Corrected:
    """An answer with what was wrong in it."""

    text: str
    statements: list[Statement]
    """Of the answer as it was."""
    answers: dict[str, Answer]
    """By question, of the answer as it was."""
    corrected: str
    restated: list[Statement]
    """Of the corrected answer."""


@dataclass(frozen=True)
class Uncorrected:
    """An answer that gives no pair, with what was found in it on the way."""

    skip: Skip
    statements: list[Statement]
    answers: dict[str, Answer]


def correct(example: Example, text: str, seen: Counter[str]) -> Work[Corrected | Uncorrected]:
    """Split, check, correct, and check the correction. Counts the statements in ``seen``."""
    statements: list[Statement] = []
    answers: dict[str, Answer] = {}

    def none(reason: str, detail: str = text) -> Uncorrected:
        return Uncorrected(Skip(id=example.id, reason=reason, detail=detail), statements, answers)

    if not text:
        return none(EMPTY)
    found = yield Split(example=example, text=text)
    if isinstance(found, Failed):
        return none(*found)
    if not found:
        return none(NO_STATEMENT)
    statements = found
    checked = yield Check(example=example, questions=[s.question for s in statements])
    if isinstance(checked, Failed):
        return none(*checked)
    answers = checked
    wrong = [s for s in statements if answers[s.question].verdict is False]
    seen["statements"] += len(statements)
    seen["statements_wrong"] += len(wrong)
    seen["statements_undecided"] += sum(not answers[s.question].decided for s in statements)
    if not wrong:
        return none(NOTHING_WRONG)
    corrected = yield Correct(example=example, text=text, wrong=wrong)
    if isinstance(corrected, Failed):
        return none(*corrected)
    if corrected is None:
        return none(NOT_CORRECTABLE)
    if corrected == text:
        return none(STILL_WRONG, "the correction changed nothing: " + text)
    restated = yield Split(example=example, text=corrected)
    if isinstance(restated, Failed):
        return none(*restated)
    left = yield Check(example=example, questions=[s.question for s in restated])
    if isinstance(left, Failed):
        return none(*left)
    if any(answer.verdict is False for answer in left.values()):
        return none(STILL_WRONG, f"{text} -> {corrected}")
    return Corrected(text, statements, answers, corrected, restated)
