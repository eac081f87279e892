"""Pairs to PrefixBatch: one row per image prefix, chosen and rejected branching from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.progress import track

from mlalign.branching.batch import PrefixBatch
from mlalign.branching.layout import pack
from mlalign.images import image_size, open_image
from mlalign.models._family import ImageInputs
from mlalign.models._vlm import VLM
from mlalign.records import Preference, Skip

CACHED_PIXELS = 256 * 2**20
"""Bytes of decoded images kept in memory per process."""


@dataclass(frozen=True)
class TokenisedPair:
    """Token ids of one pair: the shared prefix, and what follows it on each side."""

    pair: Preference
    prefix: list[int]
    chosen: list[int]
    rejected: list[int]


def tokenise(
    vlm: VLM, pairs: Sequence[Preference], max_length: int | None, *, quiet: bool = False
) -> tuple[list[TokenisedPair], list[Skip]]:
    """Tokens of every pair, completions cut at the end to ``max_length`` tokens a row.

    A pair of which a completion would keep no token comes out as a Skip, never as a zero; so does
    a pair that differs only beyond the cut. Raises LayoutError as VLM.branch_ids does.
    """
    done: list[TokenisedPair] = []
    skips: list[Skip] = []
    limit = min(max_length or vlm.max_positions, vlm.max_positions)
    for pair in track(pairs, description="tokenising pairs", disable=quiet or len(pairs) < 500):
        prefix, (chosen, rejected) = vlm.branch_ids(
            pair.prompt, [pair.chosen, pair.rejected], image_size(pair.image, pair.id), pair.id
        )
        room = limit - len(prefix)
        if room <= 0:
            detail = (
                f"record {pair.id!r}: the image and the prompt take {len(prefix)} tokens of "
                f"{limit}. Raise train.max_length above {len(prefix) + 1}"
            )
            skips.append(
                Skip(id=pair.id, reason="no completion token left after max_length", detail=detail)
            )
        elif chosen[:room] == rejected[:room]:
            detail = f"record {pair.id!r}: equal within {limit} tokens. Raise train.max_length"
            skips.append(
                Skip(id=pair.id, reason="chosen equals rejected after max_length", detail=detail)
            )
        else:
            done.append(TokenisedPair(pair, prefix, chosen[:room], rejected[:room]))
    return done, skips


class Collator:
    """Rows of a ``datasets`` index column to ``{"batch": PrefixBatch}``."""

    def __init__(
        self,
        vlm: VLM,
        pairs: Sequence[TokenisedPair],
        *,
        layout: str = "shared",
        blank: bool = False,
        pack_to: int | None = None,
    ) -> None:
        """``layout``: shared (one row per pair) or padded (one row per completion).
        ``blank``: every image is replaced by a uniform one (the control). ``pack_to``: several
        pairs share a row of at most so many tokens."""
        self.vlm = vlm
        self.pairs = pairs
        self.layout = layout
        self.blank = blank
        self.pack_to = pack_to
        self._by_id = {p.pair.id: p for p in pairs}
        self._cache: dict[str, ImageInputs] = {}
        self._cached_bytes = 0

    def __call__(self, rows: Sequence[dict]) -> dict[str, PrefixBatch]:
        """Collate the pairs that the rows' ``index`` names."""
        return {"batch": self.collate([self.pairs[row["index"]] for row in rows])}

    def collate(self, pairs: Sequence[TokenisedPair]) -> PrefixBatch:
        """The pairs as one batch; completions are chosen and rejected by turns."""
        images = [self._image(p.pair) for p in pairs]
        prefixes = [p.prefix for p in pairs]
        completions = [[p.chosen, p.rejected] for p in pairs]
        ids = [[p.pair.id, p.pair.id] for p in pairs]
        sides = [["chosen", "rejected"] for _ in pairs]
        if self.layout == "padded":
            prefixes = [p for p in prefixes for _ in range(2)]
            images = [i for i in images for _ in range(2)]
            completions = [[c] for both in completions for c in both]
            ids = [[i] for both in ids for i in both]
            sides = [[s] for both in sides for s in both]
        rows = None
        if self.pack_to is not None:
            lengths = [
                len(p) + sum(map(len, c)) for p, c in zip(prefixes, completions, strict=True)
            ]
            rows = pack(lengths, self.pack_to)
        return self.vlm.rows(prefixes, completions, images, rows=rows, ids=ids, sides=sides)

    def with_a_mate(self, batch: PrefixBatch) -> PrefixBatch:
        """The pairs of a batch again, behind the longest pair of all."""
        longest = max(self.pairs, key=lambda p: len(p.prefix) + len(p.chosen) + len(p.rejected))
        return self.collate([longest, *(self._by_id[name] for name in batch.ids_C[0::2])])

    def image_of(self, name: str) -> str:
        """Text that changes with the image of a record, as it is shown."""
        if self.blank:
            return "blank"
        pair = self._by_id[name].pair
        return pair.image_sha256 or pair.image.sha256()

    def _image(self, pair: Preference) -> ImageInputs:
        key = pair.image_sha256 or pair.image.sha256()
        if key not in self._cache:
            image = self.vlm.image(open_image(pair.image, pair.id))
            if self.blank:
                image = self.vlm.blank(image)
            size = sum(tensor.nbytes for tensor in image.tensors.values())
            if self._cached_bytes + size > CACHED_PIXELS:
                return image
            self._cache[key] = image
            self._cached_bytes += size
        return self._cache[key]
