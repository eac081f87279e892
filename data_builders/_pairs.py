"""What all builders share: differing spans, the cap on unequal mention counts, records."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

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

    The first ones that there is room for; each other gives a Skip. Pairs of no description pass
    freely and are not counted.
    """

    def __init__(self, share: float, candidates: Iterable[Preference]) -> None:
        """``candidates``: every pair that ``admit`` will be asked about; only counted here."""
        self.share = share
        self.equal = sum(equal_counts(pair) is True for pair in candidates)
        self.unequal = 0

    def admit(self, pair: Preference) -> Preference | Skip:
        """The pair, or why it is left out."""
        if equal_counts(pair) is not False:
            return pair
        if self.equal < self.share * (self.equal + self.unequal + 1):
            sides = pair.scores[CHOSEN_MENTIONS], pair.scores[REJECTED_MENTIONS]
            return Skip(
                id=pair.id, reason=COUNTS_DIFFER, detail=f"{sides[0]:.0f} against {sides[1]:.0f}"
            )
        self.unequal += 1
        return pair
