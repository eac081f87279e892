"""Pairs to PrefixBatch: one row per image prefix, chosen and rejected branching from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.progress import track
from torch import Tensor

from mlalign.branching.batch import ImageView, PrefixBatch
from mlalign.branching.layout import pack
from mlalign.data.pictures import Pictures
from mlalign.data.views import view_image, view_key
from mlalign.images import image_size, open_image
from mlalign.models._family import ImageInputs
from mlalign.models._vlm import VLM
from mlalign.records import Preference, Skip


@dataclass(frozen=True)
class TokenisedPair:
    """Token ids of one pair: the shared prefix, and what follows it on each side."""

    pair: Preference
    prefix: list[int]
    chosen: list[int]
    rejected: list[int]
    edited: tuple[list[float], list[float]] | None = None
    """Weight of the record's segment at each token of chosen and rejected, 0 outside."""


def tokenise(
    vlm: VLM,
    pairs: Sequence[Preference],
    max_length: int | None,
    *,
    quiet: bool = False,
    edits: bool = False,
) -> tuple[list[TokenisedPair], list[Skip]]:
    """Tokens of every pair, completions cut at the end to ``max_length`` tokens a row.

    ``edits``: find the tokens of the records' segments too, for objectives that weigh them.

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
            edited = _edited(vlm, pair, len(chosen), len(rejected), room) if edits else None
            done.append(TokenisedPair(pair, prefix, chosen[:room], rejected[:room], edited))
    return done, skips


def _edited(
    vlm: VLM, pair: Preference, chosen: int, rejected: int, room: int
) -> tuple[list[float], list[float]]:
    """A token belongs to a segment where they share a character; to the heavier of two."""
    size = image_size(pair.image, pair.id)
    found = []
    for side, text, tokens in (
        ("chosen", pair.chosen, chosen),
        ("rejected", pair.rejected, rejected),
    ):
        segments = [s for s in pair.segments if s.side == side]
        weights = [0.0] * tokens
        if segments:
            spans = vlm.token_spans(pair.prompt, text, size, pair.id)[-tokens:]
            for place, (start, end) in enumerate(spans):
                own = [s.weight for s in segments if s.start < end and start < s.end]
                weights[place] = max(own, default=0.0)
        found.append(weights[:room])
    return found[0], found[1]


_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class _Group:
    """One prefix and what branches from it."""

    prefix: list[int]
    completions: list[list[int]]
    image: ImageInputs
    id: str
    sides: tuple[str, ...]


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
        views: Sequence[ImageView] = (),
        seed: int = 0,
    ) -> None:
        """``layout``: shared (one row per pair) or padded (one row per completion).
        ``blank``: every image is replaced by a uniform one (the control). ``pack_to``: several
        pairs share a row of at most so many tokens. ``views``: what the objective compares with
        beside chosen and rejected; ``seed``: of what they draw."""
        self.vlm = vlm
        self.pairs = pairs
        self.layout = layout
        self.blank = blank
        self.pack_to = pack_to
        self.views = tuple(views)
        self.seed = seed
        self._by_id = {p.pair.id: p for p in pairs}
        self._pictures = Pictures(vlm, blank=blank)

    def __call__(self, rows: Sequence[dict]) -> dict[str, PrefixBatch]:
        """Collate the pairs that the rows' ``index`` names."""
        return {"batch": self.collate([self.pairs[row["index"]] for row in rows])}

    def collate(self, pairs: Sequence[TokenisedPair]) -> PrefixBatch:
        """The pairs as one batch; completions are chosen and rejected by turns, then the views."""
        groups = [
            _Group(p.prefix, [p.chosen, p.rejected], self._image(p.pair), p.pair.id, _SIDES)
            for p in pairs
        ]
        seen = [view for view in self.views if view.scores == "chosen"]
        for view in seen:
            groups += [self._view(view, p) for p in pairs]
        batch = self._rows(groups)
        edits = [e for p in pairs if p.edited is not None for e in p.edited]
        if edits:
            batch = replace(batch, edited_CS=_padded(edits, batch.mask_CS))
        aside = {
            view.name: self._rows([self._view(view, p) for p in pairs])
            for view in self.views
            if view.scores == "argmax"
        }
        return replace(batch, views=tuple(view.name for view in seen), aside=aside)

    def _rows(self, groups: Sequence[_Group]) -> PrefixBatch:
        if self.layout == "padded":
            groups = [
                replace(g, completions=[c], sides=(s,))
                for g in groups
                for c, s in zip(g.completions, g.sides, strict=True)
            ]
        rows = None
        if self.pack_to is not None:
            rows = pack(
                [len(g.prefix) + sum(map(len, g.completions)) for g in groups], self.pack_to
            )
        return self.vlm.rows(
            [g.prefix for g in groups],
            [g.completions for g in groups],
            [g.image for g in groups],
            rows=rows,
            ids=[[g.id] * len(g.sides) for g in groups],
            sides=[list(g.sides) for g in groups],
        )

    def _view(self, view: ImageView, pair: TokenisedPair) -> _Group:
        """The chosen answer behind the view's image."""
        prefix, record = pair.prefix, pair.pair
        if view.image == "blank" or self.blank:
            image = self.vlm.blank(self._image(record))
        else:
            changed = view_image(view, record, open_image(record.image, record.id), self.seed)
            image = self.vlm.image(changed)
            if view.image == "record":
                # An image of another size may take another number of tokens.
                prefix = self.vlm.branch_ids(
                    record.prompt, [record.chosen, record.rejected], changed.size, record.id
                )[0]
        return _Group(prefix, [pair.chosen], image, record.id, (view_key(view, self.seed),))

    def with_a_mate(self, batch: PrefixBatch) -> PrefixBatch:
        """The pairs of a batch again, behind the longest pair of all."""
        longest = max(self.pairs, key=lambda p: len(p.prefix) + len(p.chosen) + len(p.rejected))
        return self.collate([longest, *(self._by_id[name] for name in batch.pair_ids)])

    def image_of(self, name: str, side: str) -> str:
        """Text that changes with the image of a record, as it is shown on a side."""
        if self.blank:
            return "blank"
        pair = self._by_id[name].pair
        shown = pair.image_sha256 or pair.image.sha256()
        if side in _SIDES:
            return shown
        other = pair.rejected_image
        return f"{shown} {side}" + (f" {other.sha256()}" if other is not None else "")

    def _image(self, pair: Preference) -> ImageInputs:
        return self._pictures(pair.image, pair.id, pair.image_sha256)


def _padded(weights: Sequence[Sequence[float]], mask_CS: Tensor) -> Tensor:
    """(C, S) float32 of lists, one per completion from the first on; 0 elsewhere."""
    out = torch.zeros(mask_CS.shape)
    for row, values in zip(out, weights, strict=False):
        row[: len(values)] = torch.tensor(values)
    return out
