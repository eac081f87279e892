"""Spans of characters, laid on the tokens of the completions.

A token is in a span where it spells one of its characters; between two spans of one term it is in
the one that it shares more characters with, the earlier of equals. A token that spells nothing (a
blank, the end of turn) is in the span around it; at the tail of a completion it is in a span that
reaches the last character: so a span over the whole text holds every token.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Offsets = Sequence[tuple[int, int]]
"""Characters [start, end) that each token of a completion spells."""


class TokenSpans(NamedTuple):
    """Scored spans of R completions on their tokens. Float64 and int64."""

    score_RT: Tensor
    """Sum of the scores of the spans that each token is in (spans of different terms overlap)."""
    score_J: Tensor
    """Score of each span, row by row."""
    row_J: Tensor
    """Its row."""
    last_J: Tensor
    """The last token that is in it."""


def lay_spans(
    spans_R: Sequence[Iterable[tuple[int, int, float, str]]],
    offsets_R: Sequence[Offsets],
    width: int,
) -> TokenSpans:
    """Spans (start, end, score, term) of each completion on its tokens, padded to ``width``.

    The spans of a term stand in text order. Raises ValueError, naming row and span, for a span of
    which no token spells a character.
    """
    score_RT = torch.zeros(len(offsets_R), width, dtype=torch.float64)
    scores: list[float] = []
    rows: list[int] = []
    lasts: list[int] = []
    for row, (spans, offsets) in enumerate(zip(spans_R, offsets_R, strict=True)):
        own_tokens = _Tokens(offsets)
        owners: dict[tuple[str, int], tuple[int, float]] = {}
        for start, end, score, term in spans:
            inside = own_tokens.of(start, end)
            if not inside:
                raise ValueError(
                    f"row {row}: no token spells span {start}:{end} of {term}. The offsets must be "
                    "those of the completion that was scored"
                )
            for token in inside:
                shared = own_tokens.shared(token, start, end)
                if shared > owners.get((term, token), (0, 0.0))[0]:
                    owners[term, token] = (shared, score)
            scores.append(score)
            rows.append(row)
            lasts.append(inside[-1])
        for (_, token), (_, score) in owners.items():
            score_RT[row, token] += score
    return TokenSpans(
        score_RT=score_RT,
        score_J=torch.tensor(scores, dtype=torch.float64),
        row_J=torch.tensor(rows, dtype=torch.long),
        last_J=torch.tensor(lasts, dtype=torch.long),
    )


class _Tokens:
    """The tokens of one completion, which stand in the order of their characters."""

    def __init__(self, offsets: Offsets) -> None:
        self.offsets = offsets
        self.starts = [start for start, _ in offsets]
        self.ends = [end for _, end in offsets]
        self.spelt = max((end for start, end in offsets if end > start), default=0)
        """Where the last token that spells anything ends."""

    def of(self, start: int, end: int) -> range:
        """Those of a span; empty where none of them spells anything of it."""
        first, last = bisect_right(self.ends, start), bisect_left(self.starts, end)
        if not any(self.offsets[t][1] > self.offsets[t][0] for t in range(first, last)):
            return range(0)
        return range(first, len(self.offsets) if end >= self.spelt else last)

    def shared(self, token: int, start: int, end: int) -> int:
        """Characters that a token shares with a span that it is of; 1 where it spells nothing."""
        first, last = self.offsets[token]
        return min(last, end) - max(first, start) if last > first else 1
