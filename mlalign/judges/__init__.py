"""Who says what is true of an image: one file per judge. All answer yes/no questions.

A judge is built as ``METHOD(settings, vlm=..., vocabulary=...)``; what it does not need it ignores,
what it needs and is not given it refuses with a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mlalign.records import Example


class Answer(NamedTuple):
    """Probabilities of the two answers; they need not sum to one. Both NaN: undecided, the judge
    does not know. Callers count those, they are neither a yes nor a no."""

    p_yes: float
    p_no: float

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
