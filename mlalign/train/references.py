"""Reference log-probs while training: from the cache where they are there, else computed and kept.

Every rank asks its own cache; under ZeRO-3 a forward pass needs all ranks, so a batch counts as a
hit only where it is one on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mlalign.branching.batch import PrefixBatch, TokenLogps
from mlalign.branching.reference_cache import ReferenceCache
from mlalign.branching.reference_key import CacheError, CacheKey, InputDigest, input_digest

FAULT, MISS, HIT = 0, 1, 2
"""What a rank's cache said of a batch; the least of all ranks counts."""


class References:
    """The cache of one arm. ``image_of``: text that changes with the image that a record (id) shows
    on a side."""

    def __init__(
        self, root: str | Path, key: CacheKey, image_of: Callable[[str, str], str], rank: int = 0
    ) -> None:
        self.cache = ReferenceCache.open(key.folder_in(root), key, rank=rank)
        self.image_of = image_of
        self.hits = 0
        self.misses = 0
        """Batches."""

    def get(self, batch: PrefixBatch, compute: Callable[[], TokenLogps]) -> TokenLogps:
        """The batch's reference log-probs. Raises StaleEntry for a record that has changed."""
        digests_C = self._digests(batch)
        found, fault = None, None
        try:
            found = self.cache.get(batch, digests_C)
        except CacheError as error:
            fault = error
        # A rank that stopped here alone would leave the others waiting in a forward pass.
        verdict = _least(FAULT if fault else HIT if found is not None else MISS)
        if verdict == FAULT:
            raise fault or CacheError("the reference cache of another process: see its message")
        if verdict == HIT and found is not None:
            self.hits += 1
            return found
        self.misses += 1
        made = compute()
        self.cache.put(batch, digests_C, made)
        return made

    def flush(self) -> None:
        """Commit what was computed."""
        self.cache.flush()

    def _digests(self, batch: PrefixBatch) -> list[InputDigest]:
        """One per completion, in the order of completions."""
        prefix_of = {
            (row, group.stops[0] - 1): batch.input_ids_RT[row, group.start : group.stops[0]].cpu()
            for row, groups in enumerate(batch.groups_R)
            for group in groups
        }
        places = zip(batch.row_C.tolist(), batch.source_CS[:, 0].tolist(), strict=True)
        return [
            input_digest(prefix_of[place], self.image_of(name, side))
            for place, name, side in zip(places, batch.ids_C, batch.sides_C, strict=True)
        ]


class Refresh(TrainerCallback):
    """At every epoch each rank commits what it computed and reads what the others did: the next
    epoch gives it other records."""

    def __init__(self, references: References) -> None:
        self.references = references

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Called by the trainer on every rank."""
        self.references.flush()
        _least(HIT)  # all have committed
        self.references.cache.refresh()


def _least(vote: int) -> int:
    """The smallest vote of all ranks."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return vote
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    votes = torch.tensor(vote, device=device)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN)
    return int(votes)
