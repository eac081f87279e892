"""Rows at which an answer writes an object word, or has just written it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlalign.probes._probe import Item
from mlalign.probes._records import COMPLETIONS, Mention


class WordRow(NamedTuple):
    """The row that produces one token of a completion."""

    completion: int
    token: int
    """Number of the token among the completion's; the row is ``queries(row)[completion][token]``,
    one position before the token."""
    mention: Mention


def writing(item: Item, limit: int, completions: Sequence[str] = COMPLETIONS) -> list[WordRow]:
    """Rows that produce the first token of each object word, at most ``limit``, evenly spaced."""
    return _unique(item, limit, completions, after=False)


def written(item: Item, limit: int, completions: Sequence[str] = COMPLETIONS) -> list[WordRow]:
    """Rows at the last token of each object word: they have read it and produce what follows.

    A word that ends its completion (cut off before the end of turn) has none.
    """
    return _unique(item, limit, completions, after=True)


def _unique(item: Item, limit: int, completions: Sequence[str], after: bool) -> list[WordRow]:
    """Without rows that repeat: answers that begin alike have the same states there."""
    found: dict[tuple[int, ...], WordRow] = {}
    for number, (name, ids, each) in enumerate(
        zip(COMPLETIONS, item.completions, item.mentions, strict=True)
    ):
        for mention in each if name in completions else ():
            token = mention.tokens[-1] + 1 if after else mention.tokens[0]
            if token < len(ids):
                found.setdefault(tuple(ids[:token]), WordRow(number, token, mention))
    rows = list(found.values())
    places = np.linspace(0, len(rows) - 1, min(limit, len(rows))).round().astype(int)
    return [rows[place] for place in places]
