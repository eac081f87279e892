"""Marked spans in text: what differs between two answers, what an answer claims and is not there.

Every character of model text leaves here escaped.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup, escape

from mlalign.records import Facts, Preference

_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Mark:
    """Characters [start, end) of a text, with a CSS class and a word that says what they are."""

    start: int
    end: int
    kind: str
    """CSS class: "chosen", "rejected", "false" or "true"."""
    title: str = ""


def marked(text: str, marks: Iterable[Mark]) -> Markup:
    """The text as HTML with its marks; of two that overlap the earlier (longer) is kept."""
    out, position = [], 0
    for mark in sorted(marks, key=lambda s: (s.start, -s.end)):
        if mark.start < position or mark.end > len(text) or mark.start >= mark.end:
            continue
        out.append(escape(text[position : mark.start]))
        out.append(
            Markup('<mark class="{}" title="{}">{}</mark>').format(
                mark.kind, mark.title, text[mark.start : mark.end]
            )
        )
        position = mark.end
    out.append(escape(text[position:]))
    return Markup("").join(out)


def pair_marks(pair: Preference) -> tuple[list[Mark], list[Mark]]:
    """Marks of the chosen and of the rejected answer: the record's segments, else their diff."""
    if pair.segments:
        sides: dict[str, list[Mark]] = {"chosen": [], "rejected": []}
        for s in pair.segments:
            sides[s.side].append(Mark(s.start, s.end, s.side, s.label))
        return sides["chosen"], sides["rejected"]
    return difference(pair.chosen, pair.rejected)


def difference(chosen: str, rejected: str) -> tuple[list[Mark], list[Mark]]:
    """Marks of the words that one text has and the other has not, in order."""
    a, b = _TOKEN.findall(chosen), _TOKEN.findall(rejected)
    a_at, b_at = _starts(a), _starts(b)
    ours, theirs = [], []
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for tag, i0, i1, j0, j1 in matcher.get_opcodes():
        if tag == "equal":
            continue
        ours += _trimmed(chosen, a_at[i0], a_at[i1], "chosen")
        theirs += _trimmed(rejected, b_at[j0], b_at[j1], "rejected")
    return _joined(ours, chosen), _joined(theirs, rejected)


def present(facts: Facts, vocabulary: Any) -> frozenset[str]:
    """Canonical names of what is there; captions speak where the facts are not exhaustive."""
    names = facts.names()
    if facts.exhaustive:
        return names
    return names | {s.name for text in facts.captions for s in vocabulary.objects(text)}


def claimed(text: str, there: Collection[str], vocabulary: Any) -> list[Mark]:
    """Marks of the objects that a text mentions: "false" where they are not among ``there``."""
    return [
        Mark(span.start, span.end, "true", f"{span.name}: in the image")
        if span.name in there
        else Mark(span.start, span.end, "false", f"{span.name}: not known to be in the image")
        for span in vocabulary.objects(text)
    ]


def _joined(found: list[Mark], text: str) -> list[Mark]:
    """Neighbours with nothing but blanks between them become one."""
    out: list[Mark] = []
    for mark in found:
        if out and not text[out[-1].end : mark.start].strip():
            out[-1] = replace(out[-1], end=mark.end)
        else:
            out.append(mark)
    return out


def _starts(tokens: list[str]) -> list[int]:
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(token))
    return starts


def _trimmed(text: str, start: int, end: int, kind: str) -> list[Mark]:
    inner = text[start:end]
    start += len(inner) - len(inner.lstrip())
    end -= len(inner) - len(inner.rstrip())
    return [Mark(start, end, kind, f"only in {kind}")] if start < end else []
