"""What an answer says of its image, claim by claim, with the yes/no question that each answers.

By rule, no model: "english" over a vocabulary's spans of objects and attributes, "microworld" by
the built-in world's grammar. A model's splitting comes through ``RewardContext.split``. Every
occurrence is a claim with its own place, so that a thing said twice is scored twice; the questions
are the same, and asked once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from mlalign.objects import presence_question

Language = Literal["english", "microworld"]

_JOINED = re.compile(r"[\s,]*(?:and\s+)?")
"""What may stand between an attribute and its noun, or the next attribute."""


class Stated(NamedTuple):
    """One claim."""

    start: int
    end: int
    """Characters [start, end) of the text that say it."""
    question: str
    """Answered by yes where it is true."""


def splitter(language: Language, vocabulary: Any) -> Callable[[str], Sequence[Stated]]:
    """Text -> its claims. Raises ValueError where the language needs a vocabulary."""
    if language == "microworld":
        return _microworld
    if vocabulary is None:
        raise ValueError("claims in English need an object vocabulary: give data.vocabulary")
    return lambda text: _english(text, vocabulary)


def _english(text: str, vocabulary: Any) -> list[Stated]:
    """The presence of each object mentioned, and each attribute that stands before it."""
    looks = vocabulary.attributes(text)
    stated = []
    for thing in vocabulary.objects(text):
        stated.append(Stated(thing.start, thing.end, presence_question(thing.name)))
        left = thing.start
        for look in reversed([each for each in looks if each.end <= thing.start]):
            if not _JOINED.fullmatch(text[look.end : left]):
                break
            asked = f"Is the {thing.name} {look.name}?"
            stated.append(Stated(look.start, look.end, asked))
            left = look.start
    return sorted(stated)


def _microworld(text: str) -> list[Stated]:
    """Each object with its colour and place; the span is the whole phrase."""
    from mlalign.microworld.language import claim_question, parse_caption

    return [Stated(*found.span, claim_question(found.mention)) for found in parse_caption(text)[0]]
