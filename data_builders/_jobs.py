"""Language work as jobs, so that a rule or a model on a server can do the work of a whole chunk.

A builder writes what happens to one record as a generator that yields jobs and is sent their
results; ``in_step`` runs the generators of many records side by side and hands everything that they
wait for to a ``Scribe`` at once. What a scribe could not do as asked comes back as ``Failed``: the
builder counts it by its reason, and nothing stands in for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from mlalign.records import Example

T = TypeVar("T")


class Failed(NamedTuple):
    """A job without a result."""

    reason: str
    """Short and countable, with the kind of job first: "splitting: the answer is no JSON"."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work for one record."""

    example: Example


@dataclass(frozen=True, kw_only=True)
class Split(Job):
    """-> list[Statement]: what a text says of the image."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Check(Job):
    """-> dict[str, Answer] by question: what the facts of the image (or a judge) say."""

    questions: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Correct(Job):
    """-> str | None: the text with its wrong statements, and nothing else, made true."""

    text: str
    wrong: Sequence[Any]
    """Statements of the text."""


@dataclass(frozen=True, kw_only=True)
class Paraphrase(Job):
    """-> str | None: the same statements in wording ``number``."""

    text: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Corrupt(Job):
    """-> Corruption | None: the text with one thing made wrong. See ``Language.corrupted``."""

    text: str
    kind: str
    rng: random.Random
    avoid: Sequence[str] = ()
    change: int = 0


@dataclass(frozen=True, kw_only=True)
class Convert(Job):
    """-> list[str]: one yes/no question for each statement about the image."""

    statements: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Rate(Job):
    """-> Rating of one answer on one aspect."""

    text: str
    aspect: str
    rubric: str
    """Name of the prompt file that says what the numbers mean."""
    show: Literal["image", "facts", "both"] = "image"
    """What the rater is given to judge by."""


class Rating(NamedTuple):
    """1 (worst) to 5 (best), and why."""

    value: float
    rationale: str


class Scribe(Protocol):
    """Who does language work: ``RuleScribe`` or ``ModelLanguage``."""

    how: str
    """"rule" or "model"; stands in ``origin``."""

    def origin(self) -> dict[str, str]:
        """``how``, and who: what a record says of the hand that wrote it."""
        ...

    def do(self, jobs: Sequence[Job]) -> list[Any]:
        """The result of each job, in order, or ``Failed``."""
        ...


Work = Generator[Job, Any, T]
"""What happens to one record: yields jobs, is sent their results, returns what came of it."""


def in_step(works: Sequence[Work[T]], do: Callable[[list[Job]], list[Any]]) -> list[T]:
    """The results of all generators, in order. ``do`` gets, round by round, one job of each that
    is not done yet."""
    done: dict[int, T] = {}
    waiting: list[tuple[int, Job]] = []

    def advance(number: int, result: Any) -> None:
        try:
            waiting.append((number, works[number].send(result)))
        except StopIteration as end:
            done[number] = end.value

    for number in range(len(works)):
        advance(number, None)
    while waiting:
        turn, waiting[:] = list(waiting), []
        for (number, _), result in zip(turn, do([job for _, job in turn]), strict=True):
            advance(number, result)
    return [done[number] for number in range(len(works))]
