"""Who says what is true of an image, and who rewrites text: one file per judge.

All answer yes/no questions; one that can also write text (``Writer``) does a builder's language
work: splitting, correcting, corrupting, rating. A judge is built as ``METHOD(settings, vlm=...,
vocabulary=...)``; what it does not need it ignores, what it needs and is not given it refuses with
a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mlalign.records import Example, ImageRef


class Answer(NamedTuple):
    """Probabilities of the two answers; they need not sum to one. Both NaN: undecided, the judge
    does not know. Callers count those, they are neither a yes nor a no."""

    p_yes: float
    p_no: float
    failure: str = ""
    """Undecided because no answer came, short and countable; asked again, the judge may know. Empty
    where it did answer."""

    @property
    def decided(self) -> bool:
        """False where the judge does not know."""
        return not math.isnan(self.p_yes)

    @property
    def verdict(self) -> bool | None:
        """True for yes, False for no (only where p_no > p_yes), None where undecided."""
        return not self.p_no > self.p_yes if self.decided else None


UNDECIDED = Answer(math.nan, math.nan)


class Judge(Protocol):
    """What every judge offers."""

    def ask(self, example: Example, questions: Sequence[str]) -> list[Answer]:
        """One answer per question about one image, in order."""
        ...

    def ask_many(
        self, examples: Sequence[Example], questions: Sequence[Sequence[str]]
    ) -> list[list[Answer]]:
        """Answers of several images, each with its own questions (possibly none), in order."""
        ...


class Task(NamedTuple):
    """One text to be written."""

    id: str
    """Of the record that it belongs to; messages and counts name it."""
    text: str
    """The whole instruction, as the user's turn."""
    image: ImageRef | None = None


class Written(NamedTuple):
    """What came of a task. A failure is counted by its reason; no text stands in for it."""

    text: str | None
    """None: failed."""
    failure: str = ""
    """Short and countable, e.g. "no answer after 5 attempts"."""


class Writer(Protocol):
    """A model that follows written instructions, about an image or not."""

    def write_many(
        self,
        tasks: Sequence[Task],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Written]:
        """One result per task, in order. The seed of a task depends on ``seed`` and its id."""
        ...
