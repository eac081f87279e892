"""A sampled answer as rewards take it: its text, and which characters each token spells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlalign.models._offsets import decode, token_offsets
from mlalign.records import Example
from mlalign.rewards._reward import Completion


def completion_of(
    tokenizer: Any,
    ends: Sequence[int],
    example: Example,
    ids: Sequence[int],
    *,
    sample: int = 0,
    length_bonus: float = 1.0,
) -> Completion:
    """What was sampled, up to and with the first end of turn (one of ``ends``), as a Completion.

    Raises RecordError where nothing was sampled.
    """
    stop = next((i for i, token in enumerate(ids) if token in set(ends)), None)
    own = tuple(ids) if stop is None else tuple(ids[: stop + 1])
    spelt = own if stop is None else own[:-1]
    text = decode(tokenizer, spelt).strip()
    offsets = token_offsets(tokenizer, spelt, text, example.id)
    return Completion(
        example=example,
        text=text,
        token_ids=own,
        offsets=offsets if stop is None else (*offsets, (len(text), len(text))),
        stopped=stop is not None,
        sample=sample,
        length_bonus=length_bonus,
    )
