"""Which characters of an answer each of its tokens spells.

Found by decoding the tokens, never by tokenising the text again: a policy may spell a word by other
tokens than its tokenizer would. Characters that are not blanks are counted, so that neither a
tokenizer's leading blank nor a word-level decoder's spacing matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlalign.records import RecordError

BROKEN = "\ufffd"
"""What decoders write for a character of which bytes are missing."""
_BEFORE = 4
"""Tokens decoded again before each one: what a decoder does at a border must not be counted."""


def token_offsets(
    tokenizer: Any, ids: Sequence[int], text: str, name: str
) -> tuple[tuple[int, int], ...]:
    """Characters [start, end) of ``text`` for each token; (p, p) for one that spells none, p where
    the last character before it ends.

    A character of several byte tokens belongs to each of them. Takes one decoding of a few tokens
    for each. Raises RecordError, naming the record, where the tokens do not spell the text.
    """
    places = [i for i, c in enumerate(text) if not c.isspace()]
    done, window = 0, 0
    borders = [0]
    base = 0
    spans: list[tuple[int, int]] = []
    for position in range(len(ids)):
        piece = decode(tokenizer, ids[window : position + 1])
        broken = piece.endswith(BROKEN) and position + 1 < len(ids)
        now = base + _solid(piece.rstrip(BROKEN) if broken else piece)
        # Each byte of a character that is not whole yet spells it.
        spans.append((done, max(now + broken, done)))
        done = now
        if not broken:
            borders.append(position + 1)
            if len(borders) > _BEFORE:
                window = borders[-_BEFORE]
                base = now - _solid(decode(tokenizer, ids[window : position + 1]))
    if done != len(places):
        raise RecordError(
            name,
            "text",
            f"{text!r} decodes as {decode(tokenizer, ids)!r}, so its words have no tokens",
            "Give the text that these tokens spell",
        )
    return tuple(_characters(places, first, last) for first, last in spans)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of the tokens, special ones left out, nothing tidied."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _characters(places: list[int], first: int, last: int) -> tuple[int, int]:
    """Counts of characters that are not blanks -> characters of the text."""
    last = min(last, len(places))
    if last <= first:
        at = places[first - 1] + 1 if first else 0
        return at, at
    return places[first], places[last - 1] + 1


def _solid(text: str) -> int:
    return sum(not c.isspace() for c in text)
