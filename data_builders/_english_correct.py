"""Correction by rule: wrong objects exchanged for omitted true ones or cut out, looks mended."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_builders._english_words import DETERMINERS, LIVING, SAY, group_of
from data_builders._language import Statement
from data_builders._phrases import Phrase, phrases, splice
from mlalign.judges._attributes import alike, kind
from mlalign.objects import plural
from mlalign.records import Facts

_LEADS = (
    "with", "and", "on", "in", "at", "by", "near", "beside", "behind", "under", "over", "onto",
    "into", "through", "along", "across", "around", "inside", "outside", "from", "of", "toward",
    "towards", "after", "to", "against", "while", "as",
)  # fmt: skip
_HELD = re.compile(
    r"^ (?:of [a-z]+|(?:in|on|with|over|under) (?:its|his|her|their) [a-z]+)(?= |[.,]|$)",
    re.IGNORECASE,
)
"""What goes with a thing that is cut out: "a frisbee in its mouth", "a bottle of water"."""
_NEXT_ITEM = re.compile(rf"^(?:,| and) (?=(?:{'|'.join(DETERMINERS)}) )")
_ENDS = re.compile(r"^\w+(?: [\w-]+){1,3}\.?$")
"""A noun phrase that ends its sentence."""
_LOOSE = re.compile(
    r"\b(?:with|near|beside|behind|next to|in front of|by|and|and some) $", re.IGNORECASE
)
_WORD = re.compile(r"[A-Za-z'-]+")


def corrected(text: str, wrong: Sequence[Statement], facts: Facts, vocabulary: Any) -> str | None:
    """See ``_language.Language.corrected``."""
    absent = {s.object for s in wrong if s.attribute is None}
    said = {p.name for p in phrases(text, vocabulary)}
    omitted = _omitted(facts, said - absent, vocabulary)
    looks = {(s.object, s.attribute) for s in wrong if s.attribute is not None}
    for name in dict.fromkeys(s.object for s in wrong if s.attribute is None):
        replacement: tuple[str, str] | None = None
        while phrase := _find(text, vocabulary, name):
            if replacement is None:
                fitting = next((o for o in omitted if _fits(text, phrase, o)), None)
                if fitting is not None:
                    replacement = omitted.pop(fitting)
            mended = (
                _exchange(text, phrase, *replacement)
                if replacement is not None
                else _cut(text, phrase)
            )
            if mended is None:
                return None
            text = mended
    for name, look in sorted(looks):
        if name not in absent:
            text = _mend_look(text, name, str(look), facts, vocabulary)
    return text if vocabulary.objects(text) else None


def _find(text: str, vocabulary: Any, name: str) -> Phrase | None:
    return next((p for p in phrases(text, vocabulary) if p.name == name), None)


def _fits(text: str, phrase: Phrase, name: str) -> bool:
    """Whether an object can stand where the phrase does: the living for the living, things for
    things, and anything that one can merely be near or with."""
    if (phrase.name in LIVING) == (name in LIVING):
        near = phrase.name in LIVING or name in group_of(phrase.name)
        return near or bool(_LOOSE.search(text[: phrase.start]))
    return phrase.name not in LIVING and bool(_LOOSE.search(text[: phrase.start]))


def _omitted(facts: Facts, said: set[str], vocabulary: Any) -> dict[str, tuple[str, str]]:
    """(singular, plural) words of true objects that the text leaves out, as the captions call
    them, by name, those that most captions name first."""
    words: dict[str, Counter[str]] = {}
    for caption in facts.captions:
        for phrase in phrases(caption, vocabulary):
            if not phrase.plural:
                words.setdefault(phrase.name, Counter())[phrase.word.lower()] += 1
    missing = [o.name for o in facts.objects if o.name not in said]
    missing = sorted(set(missing), key=lambda n: (-sum(words.get(n, Counter()).values()), n))
    out = {}
    for name in missing:
        known = words.get(name, Counter())
        # Ties by the word itself, so that the choice does not hang on the captions' order.
        word = min(known, key=lambda w: (-known[w], w)) if known else SAY.get(name, name)
        many = "people" if name == "person" and word == "person" else plural(word, _IRREGULAR)
        out[name] = (word, many)
    return out


_IRREGULAR = {"man": "men", "woman": "women", "child": "children", "person": "people",
              "mouse": "mice", "goose": "geese", "sheep": "sheep", "skis": "skis",
              "knife": "knives", "aircraft": "aircraft"}  # fmt: skip


def _exchange(text: str, phrase: Phrase, one: str, many: str) -> str:
    """The phrase's head exchanged, without the look of the thing that was not there."""
    noun = many if phrase.plural else one
    determiner = phrase.determiner
    if not determiner and not phrase.plural:
        determiner = "a"
    return splice(text, phrase.start, phrase.end, f"{determiner} {noun}".strip())


def _cut(text: str, phrase: Phrase) -> str | None:
    """Without the phrase and the word that leads to it; None where that breaks the sentence."""
    before, after = text[: phrase.start].rstrip(), text[phrase.end :]
    listed = _NEXT_ITEM.match(after)
    lead = _lead(before)
    if lead is None:
        # The subject of the sentence: only a list can do without it ("a dog and a man run").
        if not before and listed:
            rest = after[listed.end() :]
            return splice(text, 0, len(text), _singular_verb(rest))
        return None
    if listed:
        # The lead belongs to the rest of the list too; a clause in its place is not told apart.
        rest = after[listed.end() :]
        return splice(text, phrase.start, len(text), rest) if _ENDS.match(rest) else None
    held = _HELD.match(after)
    end = phrase.end + (held.end() if held else 0)
    rest = text[end:]
    if re.match(r"^ (?:that|which|who|is|are|was|were)\b", rest):
        return None
    return splice(text, lead, end, " " if rest[:1].isalnum() else "")


def _lead(before: str) -> int | None:
    """Where the words begin that lead to a phrase: "in front of", "holding", ", and"."""
    words = list(_WORD.finditer(before))
    if not words:
        return None
    last = words[-1]
    for phrase in ("in front of", "next to", "on top of", "close to", "far from", "out of"):
        if before.lower().endswith(" " + phrase):
            start = len(before) - len(phrase)
            return _with_verb(before, start)
    word = last[0].lower()
    if word in _LEADS or (word.endswith("ing") and len(words) > 2):
        return _with_verb(before, last.start())
    return None


def _with_verb(before: str, start: int) -> int | None:
    """Takes along a comma; refuses where a verb would be left without what it needs."""
    head = before[:start].rstrip()
    words = _WORD.findall(head)
    if not words:
        return None
    last = words[-1].lower()
    if last in ("is", "are", "of", "sitting", "looking", "playing", "leaning", "jumping", "and"):
        return None
    return len(head.rstrip(","))


def _singular_verb(rest: str) -> str:
    return re.sub(r"\bare\b", "is", rest, count=1)


def _mend_look(text: str, name: str, look: str, facts: Facts, vocabulary: Any) -> str:
    """The wrong attribute exchanged for a true one of its kind, else cut out."""
    true = [a for o in facts.objects if o.name == name for a in o.attributes]
    same_kind = [a for a in true if a in kind(look) and not alike(a, look)]
    for phrase in phrases(text, vocabulary):
        said = {a.name for a in phrase.attributes}
        for span in phrase.attributes:
            if phrase.name != name or span.name != look:
                continue
            new = next((a for a in same_kind if a not in said), None)
            if new is not None:
                return splice(text, span.start, span.end, new)
            return _drop_look(text, phrase, span)
    return text


def _drop_look(text: str, phrase: Phrase, span: Any) -> str:
    """Without the attribute and the "and" that joined it to another."""
    before, after = text[: span.start], text[span.end :]
    joined = re.match(r"^,? and (?=\w)|^, ", after)
    if joined and len(phrase.attributes) > 1 and span is not phrase.attributes[-1]:
        return splice(text, span.start, span.end + joined.end(), "")
    trailing = re.search(r",? and $|, $", before)
    if trailing and len(phrase.attributes) > 1:
        return splice(text, trailing.start(), span.end, "")
    return splice(text, span.start, span.end, "")
