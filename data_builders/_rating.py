"""Answers rated 1 to 5 on VLFeedback's three aspects: by a writer, or by rule over the facts.

By rule, from the statements of an answer that can be decided:

    visual faithfulness      5 - 4 * (false statements / decided statements)
    helpfulness              1 + 4 * (objects of the facts that it names / objects of the facts)
    ethical considerations   5, a constant: no rule knows any

so that only what is true and what is covered tells answers apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from data_builders._jobs import Check, Failed, Rate, Split, Work
from data_builders._language import Statement
from mlalign.judges import Answer
from mlalign.records import Example

HELPFULNESS, FAITHFULNESS, ETHICS = (
    "Helpfulness",
    "Visual Faithfulness",
    "Ethical Considerations",
)
RUBRICS = {
    HELPFULNESS: "rubric_helpfulness",
    FAITHFULNESS: "rubric_faithfulness",
    ETHICS: "rubric_ethics",
}
"""Aspect -> prompt file that says what its numbers mean."""
CONSTANT = 5.0
"""What the rule gives on ethical considerations."""

NO_OBJECTS = "rating: the facts list no object to measure helpfulness by"
NOTHING_DECIDED = "rating: the answer states nothing that the facts decide"
EMPTY = "rating: the answer is empty"


@dataclass(frozen=True)
class Rated:
    """The ratings of one answer."""

    text: str
    ratings: dict[str, float]
    rationales: dict[str, str] = field(default_factory=dict)
    statements: Sequence[Statement] = ()
    """By rule only: what it was rated by."""
    answers: dict[str, Answer] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Of the three aspects."""
        return sum(self.ratings.values()) / len(self.ratings)


def rate_by_writer(
    example: Example, text: str, show: Literal["image", "facts", "both"]
) -> Work[Rated | Failed]:
    """One request for each aspect; an answer that lacks one of the ratings has none."""
    if not text:
        return Failed(EMPTY)
    ratings, rationales = {}, {}
    for aspect, rubric in RUBRICS.items():
        rating = yield Rate(example=example, text=text, aspect=aspect, rubric=rubric, show=show)
        if isinstance(rating, Failed):
            return rating
        ratings[aspect], rationales[aspect] = rating.value, rating.rationale
    return Rated(text, ratings, rationales)


def rate_by_rule(example: Example, text: str) -> Work[Rated | Failed]:
    """See the head of this file. Failed where the facts cannot tell."""
    names = example.facts.names()
    if not text:
        return Failed(EMPTY)
    if not names:
        return Failed(NO_OBJECTS)
    statements = yield Split(example=example, text=text)
    if isinstance(statements, Failed):
        return statements
    answers = yield Check(example=example, questions=[s.question for s in statements])
    if isinstance(answers, Failed):
        return answers
    decided = [s for s in statements if answers[s.question].decided]
    if not decided:
        return Failed(NOTHING_DECIDED, text)
    false = sum(answers[s.question].verdict is False for s in decided)
    named = names & {s.object for s in statements}
    ratings = {
        HELPFULNESS: 1 + 4 * len(named) / len(names),
        FAITHFULNESS: 5 - 4 * false / len(decided),
        ETHICS: CONSTANT,
    }
    return Rated(text, ratings, statements=statements, answers=answers)
