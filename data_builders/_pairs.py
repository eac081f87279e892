"""What all builders share: differing spans, the cap on unequal mention counts, records."""

from __future__ import annotations

import difflib
import re
from collections import deque
from collections.abc import Iterator

from mlalign.records import Preference, Segment, Skip

COUNTS_DIFFER = "mention counts differ"
"""Reason of a pair left out because too many of a builder's pairs tell the sides by counting."""

CHOSEN_MENTIONS, REJECTED_MENTIONS = "mentions_chosen", "mentions_rejected"
"""Keys in ``Preference.scores`` of a description pair: object mentions of each side."""

_TOKEN = re.compile(r"\w+|[^\w\s]")


def differing_spans(chosen: str, rejected: str, label: str) -> tuple[Segment, ...]:
    """The words that the sides do not share, as spans on both sides.

    A word that stands on one side only gives a span there and none on the other.
    """
    ours = [m.span() for m in _TOKEN.finditer(chosen)]
    theirs = [m.span() for m in _TOKEN.finditer(rejected)]
    matcher = difflib.SequenceMatcher(
        a=[chosen[a:b] for a, b in ours], b=[rejected[a:b] for a, b in theirs], autojunk=False
    )
    found = []
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag == "equal":
            continue
        if a1 > a0:
            found.append(
                Segment(side="chosen", start=ours[a0][0], end=ours[a1 - 1][1], label=label)
            )
        if b1 > b0:
            found.append(
                Segment(side="rejected", start=theirs[b0][0], end=theirs[b1 - 1][1], label=label)
            )
    return tuple(found)


def equal_counts(pair: Preference) -> bool | None:
    """Whether the sides mention equally many objects; None where the pair is no description."""
    if CHOSEN_MENTIONS not in pair.scores:
        return None
    return pair.scores[CHOSEN_MENTIONS] == pair.scores[REJECTED_MENTIONS]


class EqualCounts:
    """Lets through so many pairs with unequal mention counts as keep ``share`` of all equal.

    A pair that comes too early is held back until there is room; what is left at the end is
    skipped and counted. Pairs of no description pass freely and are not counted.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.equal = self.total = 0
        self._held: deque[Preference] = deque()

    def admit(self, pair: Preference) -> Iterator[Preference]:
        """The pairs that may go out now."""
        equal = equal_counts(pair)
        if equal is None:
            yield pair
            return
        if not equal:
            self._held.append(pair)
        else:
            self.equal, self.total = self.equal + 1, self.total + 1
            yield pair
        while self._held and self.equal >= self.share * (self.total + 1):
            self.total += 1
            yield self._held.popleft()

    def finish(self) -> Iterator[Skip]:
        """The pairs that found no room."""
        while self._held:
            pair = self._held.popleft()
            yield Skip(
                id=pair.id,
                reason=COUNTS_DIFFER,
                detail=f"{pair.scores[CHOSEN_MENTIONS]:.0f} against "
                f"{pair.scores[REJECTED_MENTIONS]:.0f}",
            )
