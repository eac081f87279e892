"""English captions of photographs: split, corrected and corrupted by rules over a vocabulary.

The rules change one noun phrase, attribute or relation and leave the rest of the sentence as a
person wrote it. What they cannot mend without breaking the sentence they refuse (None), and the
builder counts it. No language model takes part.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_builders import _english_correct as correcting
from data_builders import _english_corrupt as corrupting
from data_builders._english_words import SAY
from data_builders._language import Corruption, Statement
from data_builders._phrases import Phrase, phrases, tidy
from mlalign.objects import presence_question, with_article
from mlalign.records import Facts

_TEMPLATES = ("The image shows {}.", "In this picture one can see {}.")


class EnglishLanguage:
    """See ``_language.Language``."""

    how = "rule"

    def __init__(self, vocabulary: Any) -> None:
        self.vocabulary = vocabulary

    def tidy(self, text: str) -> str:
        return tidy(text)

    def mentions(self, text: str) -> int:
        return len(self.vocabulary.objects(text))

    def presence_question(self, name: str) -> str:
        return presence_question(name)

    def statements(self, text: str) -> list[Statement]:
        out: list[Statement] = []
        asked: set[str] = set()
        for phrase in phrases(text, self.vocabulary):
            made = [
                Statement(
                    text=text[phrase.start : phrase.end],
                    question=self.presence_question(phrase.name),
                    start=phrase.head_start,
                    end=phrase.end,
                    object=phrase.name,
                )
            ]
            for span in phrase.attributes:
                made.append(
                    Statement(
                        text=f"{span.word} {phrase.word}",
                        question=f"Is the {SAY.get(phrase.name, phrase.name)} {span.name}?",
                        start=span.start,
                        end=span.end,
                        object=phrase.name,
                        attribute=span.name,
                    )
                )
            # The same thing said twice is one claim.
            out.extend(s for s in made if s.question not in asked)
            asked.update(s.question for s in made)
        return out

    def corrected(self, text: str, wrong: Sequence[Statement], facts: Facts) -> str | None:
        return correcting.corrected(text, wrong, facts, self.vocabulary)

    def paraphrase(self, text: str, facts: Facts, number: int) -> str | None:
        if number == 0:
            return tidy(text)
        if number > len(_TEMPLATES):
            return None
        said = [_named(text, phrase) for phrase in phrases(text, self.vocabulary)]
        counts = Counter(said)
        listed = list(counts)
        if not listed:
            return None
        joined = listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " and " + listed[-1]
        return tidy(_TEMPLATES[number - 1].format(joined))

    def corrupted(
        self,
        text: str,
        facts: Facts,
        kind: str,
        rng: random.Random,
        avoid: Sequence[str] = (),
        change: int = 0,
    ) -> Corruption | None:
        make = {
            "object": corrupting.wrong_object,
            "attribute": corrupting.wrong_attribute,
            "relation": corrupting.wrong_relation,
        }[kind]
        return make(text, facts, self.vocabulary, rng, frozenset(avoid), change)


def _named(text: str, phrase: Phrase) -> str:
    """The phrase with an article of its own: "a brown dog", "two dogs", "dogs"."""
    look = text[phrase.attributes[0].start : phrase.attributes[-1].end] if phrase.attributes else ""
    noun = f"{look} {phrase.word}".strip().lower()
    if phrase.plural:
        number = phrase.determiner.lower()
        return (
            f"{number} {noun}" if number not in ("", "the", "his", "her", "its", "their") else noun
        )
    return with_article(noun)
