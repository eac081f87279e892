"""Corruption by rule: a plausible wrong object, attribute or relation put into a true caption."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from data_builders._english_words import (
    ANIMAL,
    ANIMALS,
    CARRIED,
    COMMON_COLOURS,
    GROUPS,
    HAIR_COLOURS,
    HUMAN,
    NATURAL_COLOURS,
    OPPOSITE_RELATION,
    OPPOSITE_SIZE,
    OVER,
    PEOPLE,
    SAY,
    STANDING,
    group_of,
)
from data_builders._language import Corruption
from data_builders._phrases import Phrase, phrases, splice
from mlalign.judges._attributes import COLOURS, alike
from mlalign.objects import plural, with_article
from mlalign.records import Facts

_HAIR = ("blond", "blonde")
_UPON = ("on", "onto", "on top of", "over")


def wrong_object(
    text: str,
    facts: Facts,
    vocabulary: Any,
    rng: random.Random,
    avoid: frozenset[str],
    change: int,
) -> Corruption | None:
    """A mention replaced by an absent object that could stand there, typical companions of what is
    present first; ``change`` 1 joins one instead."""
    if change > 0:
        joined = _joined(text, facts, vocabulary, rng, avoid)
        if joined is not None:
            return joined
    found = phrases(text, vocabulary)
    counts = {p.name: sum(q.name == p.name for q in found) for p in found}
    options = [p for p in found if counts[p.name] == 1 and p.name not in avoid and _simple(text, p)]
    rng.shuffle(options)
    # A person is exchanged only where nothing else is: most captions are about one.
    for phrase in sorted(options, key=lambda p: p.name == "person"):
        name = _stand_in(text, phrase, facts, vocabulary, rng, avoid)
        if name is not None:
            word = rng.choice(PEOPLE) if name == "person" else SAY.get(name, name)
            look = "" if name == "person" else _look(text, phrase).lower()
            determiner = phrase.determiner or ("" if phrase.plural else "a")
            new = " ".join(part for part in (determiner, look, _noun(word, phrase.plural)) if part)
            out = splice(text, phrase.start, phrase.end, new)
            return Corruption(text=out, kind="object", word=name, was=phrase.name)
    return None


def _stand_in(
    text: str,
    phrase: Phrase,
    facts: Facts,
    vocabulary: Any,
    rng: random.Random,
    avoid: frozenset[str],
) -> str | None:
    """An absent object for this phrase: a companion of something present where one fits.

    People and dogs, which photographs are full of, stand in for each other: a word that were
    false wherever it is put in could be unlearned without a look at the image.
    """

    def absent(name: str) -> bool:
        return name in vocabulary.names and name not in facts.names() and name not in avoid

    if phrase.name == "person":
        if HUMAN.search(text):
            return None
        if absent("dog") and rng.random() < 0.8:
            return "dog"
        pool: Sequence[str] = ANIMALS
    else:
        pool = group_of(phrase.name)
        fits = phrase.name in ANIMALS and absent("person") and not ANIMAL.search(text)
        if fits and rng.random() < 0.8:
            return "person"
    options = [name for name in pool if absent(name)]
    typical = [name for name in _companions(facts, vocabulary) if name in options]
    if typical and rng.random() < 0.75:
        return rng.choice(typical[:3])
    return rng.choice(options) if options else None


def _joined(
    text: str, facts: Facts, vocabulary: Any, rng: random.Random, avoid: frozenset[str]
) -> Corruption | None:
    """ "with a backpack" behind a person, or "near a bench" at the end; a random one of both."""
    found = phrases(text, vocabulary)
    absent = [
        n
        for n in dict.fromkeys([*_companions(facts, vocabulary), *STANDING])
        if n not in facts.names() and n not in avoid
    ]
    people = [p for p in found if p.name == "person" and not p.plural]
    carried = [n for n in absent if n in CARRIED]
    if people and carried and rng.random() < 0.5:
        phrase, name = rng.choice(people), rng.choice(carried[:3])
        out = splice(text, phrase.end, phrase.end, f" with {with_article(SAY.get(name, name))}")
        return Corruption(text=out, kind="object", word=name, was="")
    standing = [n for n in absent if n in STANDING]
    if not standing:
        return None
    name = rng.choice(standing[:5])
    end = len(text.rstrip(". "))
    out = splice(text, end, len(text), f" near {with_article(SAY.get(name, name))}.")
    return Corruption(text=out, kind="object", word=name, was="")


def wrong_attribute(
    text: str,
    facts: Facts,
    vocabulary: Any,
    rng: random.Random,
    avoid: frozenset[str],
    change: int,
) -> Corruption | None:
    """A colour or size exchanged for one that no caption of the image gives to anything."""
    true = {s.name for caption in (*facts.captions, text) for s in vocabulary.attributes(caption)}
    owner = {a.start: p.name for p in phrases(text, vocabulary) for a in p.attributes}
    spans = [s for s in vocabulary.attributes(text) if s.name not in avoid]
    rng.shuffle(spans)
    for span in spans:
        words = _other_looks(text, span, owner.get(span.start))
        words = [w for w in words if not any(alike(w, t) for t in true)]
        if words:
            word = rng.choice(words)
            out = splice(text, span.start, span.end, word)
            return Corruption(text=out, kind="attribute", word=word, was=span.name)
    return None


def _other_looks(text: str, span: Any, owner: str | None) -> list[str]:
    if span.name in _HAIR:
        return list(HAIR_COLOURS) if re.match(r"[ -]hair", text[span.end :]) else []
    if span.name in OPPOSITE_SIZE:
        # "a little girl" says how old she is, not how large.
        return [] if owner == "person" else [OPPOSITE_SIZE[span.name]]
    if span.name not in COLOURS or re.match(
        r"[ -](?:and white photo|haired|skinned)", text[span.end :]
    ):
        return []
    if owner == "person":
        return []
    pool = NATURAL_COLOURS if any(owner in group for group in GROUPS[:2]) else COMMON_COLOURS
    return [w for w in pool if not alike(w, span.name)]


def wrong_relation(
    text: str,
    facts: Facts,
    vocabulary: Any,
    rng: random.Random,
    avoid: frozenset[str],
    change: int,
) -> Corruption | None:
    """A relation turned into its opposite: on, under; in front of, behind; inside, outside."""
    spans = [
        s
        for s in vocabulary.relations(text)
        if s.name in OPPOSITE_RELATION
        and s.name not in avoid
        and (s.name not in _UPON or OVER.match(text[s.start :]))
        and re.match(r" [a-z]+ [a-z]", text[s.end :])
    ]
    if not spans:
        return None
    span = rng.choice(spans)
    word = OPPOSITE_RELATION[span.name]
    out = splice(text, span.start, span.end, word)
    return Corruption(text=out, kind="relation", word=word, was=span.name)


def _companions(facts: Facts, vocabulary: Any) -> list[str]:
    """Typical neighbours of what is present, those of most objects and of the first rank first."""
    ranks: dict[str, float] = {}
    for name in facts.names():
        for rank, other in enumerate(vocabulary.companions.get(name, ())):
            ranks[other] = ranks.get(other, 0.0) + 1 / (rank + 1)
    return sorted(ranks, key=lambda n: (-ranks[n], n))


def _simple(text: str, phrase: Phrase) -> bool:
    """Whether the head stands as a noun of its own ("a dog agility course" has no dog in it)."""
    after = re.match(r"\s*('s\b)?", text[phrase.end :])
    return not (after and after[1])


def _look(text: str, phrase: Phrase) -> str:
    if not phrase.attributes or phrase.name == "person":
        return ""
    return text[phrase.attributes[0].start : phrase.attributes[-1].end]


def _noun(word: str, many: bool) -> str:
    return plural(word, _IRREGULAR) if many else word


_IRREGULAR = {"child": "children", "sheep": "sheep", "skis": "skis", "mouse": "mice",
              "scissors": "scissors", "knife": "knives"}  # fmt: skip
