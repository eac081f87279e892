"""Where two answers differ, as segments: what RLHF-V's DDPO weighs.

Yu et al., 2312.00849, section 3.2, compare the token ids of a corrected answer and of the original
and weigh the tokens that were changed; a match counts from three tokens on. Here words and marks
are compared instead of ids, so that the segments do not hang on a tokenizer, and each of these is
decided:

    popular words      count as any other (difflib's autojunk is off)
    a match of fewer than ``min_match`` words between two edits
                       belongs to the edit; one at either end of the text does not
    words that stand on one side only, with no edit near enough to join
                       are no segment, as in the released code; with ``one_sided`` they are one on
                       the side that has them
    order              the chosen answer first: the sides swapped may align in another way

The released code compares whole rows instead: prompt and image tokens stand before both answers.
They are equal, so they add no edit; but a row of 200 units or more turns difflib's autojunk on, and
what occurs often in it no longer anchors a match, which makes edits longer. ``before`` does the
same by words. Not here: the padding behind the answers, and ids instead of words.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from mlalign.records import Segment

LABEL = "edit"
"""Label of every segment made here."""

_WORD = re.compile(r"\w+|[^\w\s]")

Span = tuple[int, int]


class Block(NamedTuple):
    """One edit, as words [start, end) of either side; one of them may be empty."""

    chosen: Span
    rejected: Span


def edit_segments(
    chosen: str,
    rejected: str,
    *,
    min_match: int = 3,
    one_sided: bool = False,
    before: Sequence[str] | None = None,
) -> tuple[Segment, ...]:
    """Segments of weight 1 over the edited words of both sides, in text order.

    ``min_match``: fewest words between two edits that count as unchanged; 1 joins nothing.
    ``one_sided``: mark also an edit that has words on one side only. ``before``: compare as the
    released code does, with these units before both answers (module's first lines). Raises
    ValueError for a ``min_match`` below 1.
    """
    ours = [m.span() for m in _WORD.finditer(chosen)]
    theirs = [m.span() for m in _WORD.finditer(rejected)]
    found = []
    blocks = edit_blocks(words(chosen), words(rejected), min_match=min_match, before=before)
    for block in blocks:
        (a0, a1), (b0, b1) = block
        if not one_sided and (a0 == a1 or b0 == b1):
            continue
        sides: tuple[tuple[Literal["chosen", "rejected"], list[Span], int, int], ...]
        sides = (("chosen", ours, a0, a1), ("rejected", theirs, b0, b1))
        for side, spans, start, end in sides:
            if end > start:
                found.append(
                    Segment(side=side, start=spans[start][0], end=spans[end - 1][1], label=LABEL)
                )
    return tuple(found)


def words(text: str) -> list[str]:
    """The units that are compared: words and single marks."""
    return _WORD.findall(text)


def edit_blocks(
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    min_match: int = 3,
    before: Sequence[str] | None = None,
) -> list[Block]:
    """The edits between two lists of words, short matches between them joined into them.

    ``before``: units that stand before both, with autojunk on; None: none, and autojunk off.
    """
    if min_match < 1:
        raise ValueError(f"min_match is {min_match}: give the words of the shortest match, 1 or up")
    rows = ([*(before or ()), *side] for side in (chosen, rejected))
    matcher = difflib.SequenceMatcher(None, *rows, autojunk=before is not None)
    blocks: list[Block] = []
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag == "equal":
            continue
        if blocks and a0 - blocks[-1].chosen[1] < min_match:
            last = blocks.pop()
            blocks.append(Block((last.chosen[0], a1), (last.rejected[0], b1)))
        else:
            blocks.append(Block((a0, a1), (b0, b1)))
    # Positions are of the row. An edit that begins before the answers is cut to them.
    skip = len(before or ())
    cut = [
        Block(*((max(0, start - skip), max(0, end - skip)) for start, end in block))
        for block in blocks
    ]
    return [block for block in cut if any(end > start for start, end in block)]
