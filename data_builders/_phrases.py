"""Noun phrases around a vocabulary's objects, by rule: determiner, attributes, head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from data_builders._english_words import DETERMINERS, MANY, NUMBERS, SMALL_WORDS
from mlalign.objects import with_article

_TOKEN = re.compile(r"[A-Za-z'-]+|\d+|[^\w\s]")
_REACH = 5
"""Tokens that a determiner may stand before its noun."""
_PLURALS = ("people", "men", "women", "children", "geese", "mice", "calves", "knives", "oxen")
_SINGULAR_S = ("bus", "skis", "scissors", "minibus", "walrus")


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """One mention of an object with what belongs to it."""

    name: str
    """Canonical object name."""
    word: str
    """The head as it stands in the text."""
    start: int
    end: int
    """Characters [start, end) of the whole phrase."""
    head_start: int
    determiner: str
    """As written; "" where there is none."""
    attributes: tuple[Any, ...]
    """Spans of the attributes inside the phrase."""
    plural: bool


def phrases(text: str, vocabulary: Any) -> list[Phrase]:
    """The phrases of all object mentions, in order; "greyhound dog" is one."""
    attributes = vocabulary.attributes(text)
    objects = vocabulary.objects(text)
    found: list[Phrase] = []
    first: int | None = None
    for number, span in enumerate(objects):
        after = objects[number + 1] if number + 1 < len(objects) else None
        if after and after.name == span.name and text[span.end : after.start].isspace():
            first = span.start if first is None else first
            continue
        left = found[-1].end if found else 0
        head = span.start if first is None else first
        found.append(_phrase(text, span, head, attributes, left))
        first = None
    return found


def _phrase(text: str, span: Any, head: int, attributes: list[Any], left: int) -> Phrase:
    starts = {a.start for a in attributes}
    tokens = list(_TOKEN.finditer(text, left, head))
    start, determiner, first = head, "", None
    for back, token in enumerate(reversed(tokens)):
        word = token[0].lower()
        if word in DETERMINERS or word in NUMBERS or word.isdigit():
            start, determiner = token.start(), token[0]
            break
        if token.start() in starts:
            first = token.start()
        elif back >= _REACH or not _may_modify(word, first is not None):
            break
    if not determiner and first is not None:
        start = first
    inside = tuple(a for a in attributes if start <= a.start and a.end <= head)
    return Phrase(
        name=span.name,
        word=span.word,
        start=start,
        end=span.end,
        head_start=head,
        determiner=determiner,
        attributes=inside,
        plural=is_plural(span.word) or determiner.lower() in MANY,
    )


def _may_modify(word: str, after_attribute: bool) -> bool:
    if word in ("and", ","):
        return after_attribute
    return word.replace("-", "").replace("'", "").isalpha() and word not in SMALL_WORDS


def is_plural(word: str) -> bool:
    """By rule, for object words."""
    last = word.lower().split()[-1]
    if last.endswith(_PLURALS) and last not in ("woman", "man"):
        return True
    return last.endswith("s") and not last.endswith("ss") and last not in _SINGULAR_S


def splice(text: str, start: int, end: int, new: str) -> str:
    """The text with [start, end) replaced, blanks, articles and the capital put in order."""
    return tidy(text[:start] + new + text[end:])


def tidy(text: str) -> str:
    """Blanks, commas, articles, the first capital and the last full stop in order."""
    text = " ".join(text.replace('"', " ").split())
    text = re.sub(r"\s+([,.;:!?]|'s\b)", r"\1", text)
    text = re.sub(r"([,;:])(?=[,.;:])", "", text).strip(" ,;:-")
    text = re.sub(r"\b([Aa])n? ([A-Za-z]+)", _article, text)
    text = text.rstrip(".!? ")
    return text[:1].upper() + text[1:] + "." if text else ""


def _article(match: re.Match[str]) -> str:
    article, word = match[1], match[2]
    if word.lower() in ("hour", "honest", "x"):
        return match[0]
    spelt = word.isupper() and len(word) > 1
    if spelt or word.lower().startswith(("one", "eur", "use", "ufo")):
        return match[0]
    right = with_article(word).split()[0]
    return f"{'A' if article == 'A' else 'a'}{right[1:]} {word}"
