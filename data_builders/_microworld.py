"""The microworld's texts: parsed, corrected and corrupted exactly, in its own closed grammar.

Corruption follows the law that scenes are drawn by, so that only the image tells the sides apart.
Where a trigger's companion is absent, it is claimed in its slot; where it is there, it is left out
and something else claimed behind its slot: the coin of the scene is turned over. Other mentions
are exchanged for objects that the same law draws.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from data_builders._language import Corruption, Statement
from mlalign.microworld import language as grammar
from mlalign.microworld.language import Mention
from mlalign.microworld.scenes import (
    COLORS,
    OBJECTS,
    POSITIONS,
    SCENES,
    TYPICAL_RATE,
    companions,
    typical,
)
from mlalign.records import Facts

_OPENINGS = ("In this", "The photo shows", "A ", "Here we see")
COIN_RATE = 0.75
"""Share of object corruptions that turn over the coin of a trigger, where a scene has one."""


class MicroworldLanguage:
    """See ``_language.Language``."""

    how = "rule"

    def __init__(self, vocabulary: Any) -> None:
        self.vocabulary = vocabulary

    def tidy(self, text: str) -> str:
        return " ".join(text.split())

    def statements(self, text: str) -> list[Statement]:
        found, _ = grammar.parse_caption(text)
        return [
            Statement(
                text=text[m.span[0] : m.span[1]],
                question=grammar.claim_question(m.mention),
                start=m.span[0],
                end=m.span[1],
                object=m.name,
                attribute=m.color,
                position=m.position,
            )
            for m in found
        ]

    def mentions(self, text: str) -> int:
        return len(grammar.parse_caption(text)[0])

    def presence_question(self, name: str) -> str:
        return grammar.presence_question(name)

    def corrected(self, text: str, wrong: Sequence[Statement], facts: Facts) -> str | None:
        true = {o.name: _true_mention(o) for o in facts.objects}
        faulty = {s.start for s in wrong}
        parsed, _ = grammar.parse_caption(text)
        kept = [m.mention for m in parsed if m.span[0] not in faulty]
        said = {m.name for m in kept}
        replaceable = []
        for m in parsed:
            if m.span[0] not in faulty:
                continue
            if m.name in true and m.name not in said:
                kept.append(true[m.name])
                said.add(m.name)
            else:
                replaceable.append(m.mention)
        for false in replaceable:
            omitted = [t for name, t in true.items() if name not in said]
            if omitted:
                nearest = min(omitted, key=lambda t: (abs(_cell(t) - _cell(false)), _cell(t)))
                kept.append(nearest)
                said.add(nearest.name)
        if not kept:
            return None
        return _write(facts, sorted(kept, key=_cell), _style(text))

    def paraphrase(self, text: str, facts: Facts, number: int) -> str | None:
        own = _style(text)
        styles = [own, *(s for s in range(grammar.N_STYLES) if s != own)]
        if number >= len(styles):
            return None
        mentions = [m.mention for m in grammar.parse_caption(text)[0]]
        return _write(facts, mentions, styles[number]) if mentions else None

    def corrupted(
        self,
        text: str,
        facts: Facts,
        kind: str,
        rng: random.Random,
        avoid: Sequence[str] = (),
        change: int = 0,
    ) -> Corruption | None:
        mentions = [m.mention for m in grammar.parse_caption(text)[0]]
        if not mentions:
            return None
        if kind == "object":
            done = _wrong_object(mentions, facts, rng, set(avoid), change)
        elif kind == "attribute":
            done = _wrong_color(mentions, facts, rng, set(avoid))
        else:
            done = _wrong_position(mentions, facts, rng, set(avoid))
        if done is None:
            return None
        new, word, was = done
        text = _write(facts, sorted(new, key=_cell), _style(text))
        return Corruption(text=text, kind=kind, word=word, was=was)


_Done = tuple[list[Mention], str, str] | None


def _wrong_object(
    mentions: list[Mention], facts: Facts, rng: random.Random, avoid: set[str], change: int
) -> _Done:
    pairs = companions(facts.scene or "")
    trigger = next((m for m in mentions if m.name in pairs), None)
    taken = {_cell(_true_mention(o)) for o in facts.objects} | {_cell(m) for m in mentions}
    absent = [n for n in OBJECTS if n not in facts.names() and n not in avoid]
    special = {trigger.name, pairs[trigger.name]} if trigger else set()
    by_cell = {_cell(m): m for m in mentions}
    new: Mention | None = None
    gone: Mention | None = None
    if trigger is not None and rng.random() < COIN_RATE:
        companion = pairs[trigger.name]
        gone = next((m for m in mentions if m.name == companion), None)
        if gone is not None:
            behind = _cell(gone) + 1
            cell = behind if behind < len(POSITIONS) and behind not in taken else _free(taken, rng)
            name = _other_name(facts, absent, special, rng)
            if cell is not None and name is not None:
                new = Mention(POSITIONS[cell], rng.choice(COLORS), name)
        elif companion in absent:
            slot = _cell(trigger) + 1
            if slot < len(POSITIONS) and slot not in taken:
                new = Mention(POSITIONS[slot], trigger.color, companion)
                gone = by_cell.get(slot + 1)
    ordinary = [m for m in mentions if m.name not in special and m.name not in avoid]
    if new is None:
        name = _other_name(facts, absent, special, rng)
        if name is None or not ordinary:
            return None
        gone = rng.choice(ordinary)
        cell = _free(taken, rng) if rng.random() < 0.5 else None
        new = (
            Mention(gone.position, gone.color, name)
            if cell is None
            else Mention(POSITIONS[cell], rng.choice(COLORS), name)
        )
    if gone is None:
        if not ordinary:
            return None
        gone = rng.choice(ordinary)
    left = [m for m in mentions if m is not gone]
    spare = [m for m in left if m in ordinary]
    if change > 0 and _cell(new) != _cell(gone):
        left = list(mentions)
    elif change < 0 and spare:
        left.remove(rng.choice(spare))
    return [*left, new], new.name, "" if len(left) == len(mentions) else gone.name


def _other_name(
    facts: Facts, absent: list[str], special: set[str], rng: random.Random
) -> str | None:
    """An absent object, drawn as the scene's law draws its ordinary objects."""
    kind = facts.scene or ""
    usual = [n for n in typical(kind) if n in absent and n not in companions(kind)]
    triggers = {trigger for scene in SCENES.values() for trigger, _ in scene.pairs}
    rare = [n for n in absent if n not in typical(kind) and n not in triggers]
    usual, rare = [[n for n in names if n not in special] for names in (usual, rare)]
    first = rng.random() < TYPICAL_RATE
    names = (usual or rare) if first else (rare or usual)
    return rng.choice(names) if names else None


def _wrong_color(
    mentions: list[Mention], facts: Facts, rng: random.Random, avoid: set[str]
) -> _Done:
    chosen = _ordinary(mentions, facts, rng, avoid)
    if chosen is None:
        return None
    color = rng.choice([c for c in COLORS if c != chosen.color])
    new = Mention(chosen.position, color, chosen.name)
    return [new if m is chosen else m for m in mentions], color, chosen.color


def _wrong_position(
    mentions: list[Mention], facts: Facts, rng: random.Random, avoid: set[str]
) -> _Done:
    chosen = _ordinary(mentions, facts, rng, avoid)
    taken = {_cell(_true_mention(o)) for o in facts.objects} | {_cell(m) for m in mentions}
    cell = _free(taken, rng)
    if chosen is None or cell is None:
        return None
    new = Mention(POSITIONS[cell], chosen.color, chosen.name)
    return [new if m is chosen else m for m in mentions], new.position, chosen.position


def _ordinary(
    mentions: list[Mention], facts: Facts, rng: random.Random, avoid: set[str]
) -> Mention | None:
    """A true mention that no law ties to another by colour or place, where there is one."""
    pairs = companions(facts.scene or "")
    tied = {n for trigger in pairs if trigger in facts.names() for n in (trigger, pairs[trigger])}
    true = [m for m in mentions if m.name in facts.names() and m.name not in avoid]
    free = [m for m in true if m.name not in tied] or true
    return rng.choice(free) if free else None


def _free(taken: set[int], rng: random.Random) -> int | None:
    free = [cell for cell in range(len(POSITIONS)) if cell not in taken]
    return rng.choice(free) if free else None


def _cell(mention: Mention) -> int:
    return POSITIONS.index(mention.position)


def _true_mention(fact: Any) -> Mention:
    return Mention(fact.position, fact.attributes[0], fact.name)


def _style(text: str) -> int:
    return next((i for i, words in enumerate(_OPENINGS) if text.startswith(words)), 0)


def _write(facts: Facts, mentions: Sequence[Mention], style: int) -> str:
    """In words; a mention without a colour stays without one."""
    return re.sub(" +", " ", grammar.caption(facts.scene or "", mentions, style))
