"""Planted facts: what a source knows of an image answers the question. No model, no torch.

Read are questions of presence ("Is there a red pot at the top left?", "Is there a dog in the
image?"), of an attribute ("Is the dog brown?"), of the scene ("Is this a kitchen?") and of two
objects with boxes ("Is the pot left of the bowl?"), by the object vocabulary's spans. An object
that the facts do not list counts as absent, as POPE and CHAIR have it, also where the facts come
from captions and may be incomplete. Whatever the facts cannot decide is ``UNDECIDED`` (both NaN):
a question without a known object, an attribute or a position of which nothing is known.

An answer is never a guess, and never a probability other than 0 and 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from mlalign.judges import UNDECIDED, Answer
from mlalign.judges._attributes import alike, contrary
from mlalign.records import Example, Facts, ObjectFact

YES, NO = Answer(1.0, 0.0), Answer(0.0, 1.0)

_POSITION = re.compile(r"\b(?:at|on|in) the ((?:top|middle|bottom)(?: (?:left|center|right))?)\b")
_SCENE = re.compile(r"^is this an? ([a-z ]+?)\??$")
_SIDES = re.compile(r"\b(left of|right of|above|below)\b")


class Settings(BaseModel):
    """Nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FactsJudge:
    """The judge. ``vocabulary``: finds objects and attributes in a question."""

    Settings = Settings

    def __init__(self, settings: Settings, *, vlm: Any = None, vocabulary: Any = None) -> None:
        if vocabulary is None:
            raise ValueError("judge facts needs an object vocabulary: give data.vocabulary")
        self.settings = settings
        self.vocabulary = vocabulary

    def ask(self, example: Example, questions: Sequence[str]) -> list[Answer]:
        """One answer per question, by ``example.facts`` alone."""
        return [self.answer(example.facts, question) for question in questions]

    def ask_many(
        self, examples: Sequence[Example], questions: Sequence[Sequence[str]]
    ) -> list[list[Answer]]:
        """Answers by example."""
        return [self.ask(e, asked) for e, asked in zip(examples, questions, strict=True)]

    def answer(self, facts: Facts, question: str) -> Answer:
        """What the facts say to one question."""
        lower = question.lower().strip()
        scene = _SCENE.match(lower)
        if scene and facts.scene is not None and not self.vocabulary.objects(question):
            return YES if scene[1] == facts.scene else NO
        place = _POSITION.search(lower)
        objects = self.vocabulary.objects(question)
        names = list(dict.fromkeys(span.name for span in objects))
        side = _SIDES.search(lower)
        if len(names) == 2 and side is not None and place is None:
            return _beside(facts, names[0], names[1], side[1])
        if len(names) != 1:
            return UNDECIDED
        inside = place.span() if place else (-1, -1)
        asked = tuple(
            span.name
            for span in self.vocabulary.attributes(question)
            if not inside[0] <= span.start < inside[1]
        )
        return _presence(facts, names[0], asked, place[1] if place else None)


def _presence(facts: Facts, name: str, asked: tuple[str, ...], place: str | None) -> Answer:
    found = [o for o in facts.objects if o.name == name]
    if not found:
        return NO
    if place is not None:
        known = [o for o in found if o.position is not None]
        if len(known) < len(found):
            return UNDECIDED
        found = [o for o in known if o.position == place]
        if not found:
            return NO if facts.exhaustive else UNDECIDED
    answers = [_has(o, asked) for o in found]
    if YES in answers:
        return YES
    return NO if all(answer == NO for answer in answers) else UNDECIDED


def _has(fact: ObjectFact, asked: tuple[str, ...]) -> Answer:
    """Whether one object has all the asked attributes. Attributes are never complete, so one that
    is not listed is only ruled out by another of its kind."""
    verdicts = []
    for word in asked:
        if any(alike(word, known) for known in fact.attributes):
            verdicts.append(YES)
        elif contrary(word, fact.attributes):
            verdicts.append(NO)
        else:
            verdicts.append(UNDECIDED)
    if NO in verdicts:
        return NO
    return YES if all(v == YES for v in verdicts) else UNDECIDED


def _beside(facts: Facts, one: str, two: str, side: str) -> Answer:
    """Whether the first object lies on that side of the second, by the centres of their boxes.

    Undecided where either is there several times or has no box, and where the centres are closer
    than half the larger side: a matter of taste.
    """
    ones = [o for o in facts.objects if o.name == one]
    twos = [o for o in facts.objects if o.name == two]
    if not ones or not twos:
        return NO
    if len(ones) > 1 or len(twos) > 1 or ones[0].box is None or twos[0].box is None:
        return UNDECIDED
    axis = 0 if side in ("left of", "right of") else 1
    (a0, a1), (b0, b1) = [(b[axis], b[axis + 2]) for b in (ones[0].box, twos[0].box)]
    gap = (b0 + b1 - a0 - a1) / 2
    if abs(gap) < max(a1 - a0, b1 - b0) / 2:
        # In the same row or column: on neither side, where the facts are complete.
        return NO if facts.exhaustive else UNDECIDED
    return YES if (gap > 0) == (side in ("left of", "above")) else NO


METHOD = FactsJudge
