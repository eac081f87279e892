"""Statements asked of a judge, and how often one judge agrees with another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_builders._context import BuildContext
from data_builders._language import Statement
from mlalign.judges import Answer
from mlalign.judges.facts import FactsJudge
from mlalign.judges.local_model import LocalModel
from mlalign.records import Claim, Example


def facts_judge(context: BuildContext) -> FactsJudge:
    """Planted facts, read with the run's vocabulary."""
    return FactsJudge(FactsJudge.Settings(), vocabulary=context.vocabulary)


def own_judge(context: BuildContext, builder: str) -> LocalModel:
    """The model to be aligned, asked about its own images."""
    return LocalModel(LocalModel.Settings(), vlm=context.need_vlm(builder))


def ask_all(
    judge: Any, examples: Sequence[Example], questions: Sequence[Sequence[str]]
) -> list[dict[str, Answer]]:
    """Answers by question, for each example; each question is asked once."""
    asked = [list(dict.fromkeys(each)) for each in questions]
    answers = judge.ask_many(examples, asked)
    return [dict(zip(a, b, strict=True)) for a, b in zip(asked, answers, strict=True)]


def claims(side: str, statements: Sequence[Statement], answers: dict[str, Answer]) -> list[Claim]:
    """The decided statements as claims; an undecided one is no claim, it has no verdict."""
    return [
        Claim(
            side=side,
            text=s.text,
            question=s.question,
            p_yes=answers[s.question].p_yes,
            p_no=answers[s.question].p_no,
            verdict="yes" if answers[s.question].verdict else "no",
        )
        for s in statements
        if answers[s.question].decided
    ]


@dataclass
class Agreement:
    """How often a judge says what the facts say, over the questions that both decide."""

    true_yes: int = 0
    true_no: int = 0
    right_yes: int = 0
    right_no: int = 0
    undecided: int = 0

    def add(self, answer: Answer, truth: Answer) -> None:
        """One question."""
        if not truth.decided or not answer.decided:
            self.undecided += 1
        elif truth.verdict:
            self.true_yes += 1
            self.right_yes += answer.verdict is True
        else:
            self.true_no += 1
            self.right_no += answer.verdict is False

    def report(self) -> dict[str, Any]:
        """Shares; None where nothing was decided."""
        total = self.true_yes + self.true_no
        return {
            "questions": total,
            "undecided_by_facts": self.undecided,
            "accuracy": _share(self.right_yes + self.right_no, total),
            "accuracy_where_true": _share(self.right_yes, self.true_yes),
            "accuracy_where_false": _share(self.right_no, self.true_no),
        }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
