"""Where the sentences of an answer stand."""

from __future__ import annotations

import re

_SENTENCE = re.compile(r"\S.*?(?:[.!?]+[\"')\]]*(?=\s|$)|$)", re.DOTALL)


def sentences(text: str) -> list[tuple[int, int]]:
    """Characters [start, end) of each sentence, in order; none of a blank text.

    A sentence ends behind full stops, exclamation or question marks (and what closes a quotation)
    that a blank or the end follows. "e.g. " so ends one: as the released ratings were cut.
    """
    return [match.span() for match in _SENTENCE.finditer(text)]
