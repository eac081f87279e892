"""Splitting, asking and rewriting text: one small interface, one file per language.

"microworld" parses and writes the built-in world's closed grammar, so its texts are exact.
"english" works by rules over the vocabulary's spans of objects, attributes and relations.
Both state ``how = "rule"``: no language model has rewritten anything, and records say so. Builders
give this work out as jobs, to ``RuleScribe`` here or to a model (``_model_language``).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_builders._jobs import Correct, Corrupt, Job, Paraphrase, Split
from mlalign.records import Facts


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One thing that a text says of its image, with the yes/no question that it answers."""

    text: str
    """The words that say it."""
    question: str
    """Answered by yes where the statement is true."""
    start: int
    end: int
    """Characters [start, end) of the text; all of it where a model does not say where."""
    object: str
    """Canonical name of the object it is about; "" where the vocabulary has none."""
    attribute: str | None = None
    """The attribute it is about, or None where it is about presence alone."""
    position: str | None = None
    """The place it names, in the source's words."""


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """A text with one thing made wrong."""

    text: str
    kind: str
    """"object", "attribute" or "relation"."""
    word: str
    """What was put in: an object's name, an attribute, a relation or a position."""
    was: str
    """What it replaced, or "" where it was joined."""


class Language(Protocol):
    """What a builder may do with a text."""

    how: str
    """How texts are rewritten; stands in ``origin``."""

    def tidy(self, text: str) -> str:
        """The text as both answers of a pair are written: case, blanks and full stop in order."""
        ...

    def statements(self, text: str) -> list[Statement]:
        """What the text says, in order."""
        ...

    def mentions(self, text: str) -> int:
        """Object mentions, repeats counted."""
        ...

    def presence_question(self, name: str) -> str:
        """The question whether an object is there."""
        ...

    def corrected(self, text: str, wrong: Sequence[Statement], facts: Facts) -> str | None:
        """The text with its wrong statements made true: a wrong object is replaced by a true one
        that the text had left out, where there is one, else removed. None where nothing would be
        left, or where the rules cannot mend it."""
        ...

    def paraphrase(self, text: str, facts: Facts, number: int) -> str | None:
        """The same statements in wording ``number``; 0 is nearest to the text's own. None where
        that wording cannot say them."""
        ...

    def corrupted(
        self,
        text: str,
        facts: Facts,
        kind: str,
        rng: random.Random,
        avoid: Sequence[str] = (),
        change: int = 0,
    ) -> Corruption | None:
        """The text with one true thing of that kind made wrong at a random place. Never puts in
        an object that the facts list, nor one of ``avoid``, nor touches what ``avoid`` names.
        ``change``: object mentions more or fewer (-1, 0, 1), where the language can. None where
        the kind cannot be applied.
        """
        ...


def find_language(name: str, vocabulary: Any) -> Language:
    """The language of that name. Raises ValueError listing those that there are."""
    if name == "microworld":
        from data_builders._microworld import MicroworldLanguage

        return MicroworldLanguage(vocabulary)
    if name == "english":
        from data_builders._english import EnglishLanguage

        return EnglishLanguage(vocabulary)
    raise ValueError(f"no language {name!r} for builders. There are: english, microworld")


class RuleScribe:
    """Does jobs by the rules of a language, one after another. It never fails; None: cannot."""

    def __init__(self, words: Language) -> None:
        self.words = words
        self.how = words.how

    def origin(self) -> dict[str, str]:
        """``how`` alone: a rule has no name."""
        return {"how": self.how}

    def do(self, jobs: Sequence[Job]) -> list[Any]:
        """The result of each job, in order. Raises TypeError for a job that needs a model."""
        return [self._do(job) for job in jobs]

    def _do(self, job: Job) -> Any:
        words, facts = self.words, job.example.facts
        match job:
            case Split():
                return words.statements(job.text)
            case Correct():
                return words.corrected(job.text, job.wrong, facts)
            case Paraphrase():
                return words.paraphrase(job.text, facts, job.number)
            case Corrupt():
                return words.corrupted(job.text, facts, job.kind, job.rng, job.avoid, job.change)
        raise TypeError(f"no rule does {type(job).__name__} jobs: they need a writer")
