"""Lay rows out: one prefix, its completions after it, padding only at the tail.

    row:        [ prefix | completion 1 | ... | completion K | padding ]
    attention:  a completion sees the prefix and itself, never a sibling
    positions:  each completion continues from the largest prefix position + 1, in every row of them

Exact, not an approximation: per-token log-probs and gradients equal those of separate unpadded
rows (for dropout 0, and for models whose only mixing over positions is attention). Several short
groups may be packed into one row under the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from mlalign.branching.batch import PADDING, PREFIX, Group, PrefixBatch


class LayoutError(ValueError):
    """Rows that cannot be laid out exactly."""


def lay_out(
    prefixes: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    pad_id: int,
    images: dict[str, Tensor] | None = None,
    image_of: Sequence[int] | None = None,
    positions: Sequence[Tensor] | None = None,
    rows: Sequence[Sequence[int]] | None = None,
    ids: Sequence[Sequence[str]] = (),
    sides: Sequence[Sequence[str]] = (),
) -> PrefixBatch:
    """One group per prefix, its completions after it; one group per row unless ``rows`` packs them.

    ``prefixes``: token ids of each prefix. ``completions``: for each, the token ids of its
    completions, any number of any lengths. ``images``: tower inputs of the different images, and
    ``image_of`` which of them each prefix has (None: its own). ``positions``: int64 (A, prefix
    tokens) for each prefix; None: 0, 1, 2... in one row. ``rows``: for each row, the numbers of its
    groups (see ``pack``). ``ids``, ``sides``: record id and side of each completion, by prefix.
    Raises LayoutError for a group without completions and for an empty prefix or completion.
    """
    _check(prefixes, completions, ids)
    rows = [[g] for g in range(len(prefixes))] if rows is None else rows
    drawn = [_Row() for _ in rows]
    found: dict[int, tuple[int, Group]] = {}
    for number, members in enumerate(rows):
        for g in members:
            own = None if positions is None else positions[g]
            found[g] = number, drawn[number].add(prefixes[g], completions[g], own)
    row_C, last_C, source, target = [], [], [], []
    for g in range(len(prefixes)):
        number, group = found[g]
        starts = group.stops[:-1]
        for start, stop, branch in zip(starts, group.stops[1:], completions[g], strict=True):
            row_C.append(number)
            # The last prefix position predicts the first token of every completion.
            source.append([group.stops[0] - 1, *range(start, stop - 1)])
            target.append(list(branch))
            last_C.append(stop - 1)
    order = list(chain.from_iterable(rows))
    position_ids = torch.stack(
        [_ragged([r.positions[a] for r in drawn], 0) for a in range(len(drawn[0].positions))]
    )
    return PrefixBatch(
        input_ids_RT=_ragged([r.ids for r in drawn], pad_id),
        position_ids=position_ids[0] if positions is None else position_ids,
        segment_RT=_ragged([r.segments for r in drawn], PADDING),
        group_RT=_ragged([r.numbers for r in drawn], PADDING),
        place_RT=_ragged([r.places for r in drawn], 0),
        groups_R=tuple(tuple(r.groups) for r in drawn),
        row_C=torch.as_tensor(row_C),
        source_CS=_ragged(source, 0),
        target_CS=_ragged(target, 0),
        mask_CS=_ragged([[1] * len(t) for t in target], 0).bool(),
        last_C=torch.as_tensor(last_C),
        images=images or {},
        image_G=tuple(g if image_of is None else image_of[g] for g in order),
        ids_C=tuple(chain.from_iterable(ids)),
        sides_C=tuple(chain.from_iterable(sides)),
    )


@dataclass
class _Row:
    """One row while it is drawn."""

    ids: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    def add(
        self, prefix: Sequence[int], branches: Sequence[Sequence[int]], positions: Tensor | None
    ) -> Group:
        start, length = len(self.ids), len(prefix)
        own = [list(range(length))] if positions is None else positions.tolist()
        # One number after the largest of all rows of positions: an image's rows end unequally.
        after = max(map(max, own)) + 1
        self.positions = self.positions or [[] for _ in own]
        self._put(prefix, PREFIX, 0, own)
        stops = [len(self.ids)]
        for number, branch in enumerate(branches, start=1):
            run = list(range(after, after + len(branch)))
            self._put(branch, number, length, [run] * len(own))
            stops.append(len(self.ids))
        group = Group(start, tuple(stops))
        self.groups.append(group)
        return group

    def _put(
        self, tokens: Sequence[int], segment: int, place: int, positions: Sequence[Sequence[int]]
    ) -> None:
        self.ids += tokens
        self.segments += [segment] * len(tokens)
        self.numbers += [len(self.groups)] * len(tokens)
        self.places += range(place, place + len(tokens))
        for row, own in zip(self.positions, positions, strict=True):
            row += own


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of group numbers, so that few rows of at most ``room`` tokens hold all groups.

    First fit, longest first (at most 11/9 of the fewest rows possible, and 1 more). A group longer
    than ``room`` has a row of its own. Rows and their groups come in the order of the groups.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for g in sorted(range(len(lengths)), key=lambda g: -lengths[g]):
        place = next((r for r, free in enumerate(left) if free >= lengths[g]), None)
        if place is None:
            place = len(rows)
            rows.append([])
            left.append(room)
        rows[place].append(g)
        left[place] -= lengths[g]
    return sorted(sorted(row) for row in rows)


def attention_mask(batch: PrefixBatch, window: int | None = None) -> Tensor:
    """Bool (R, 1, T, T), True where query (row) may attend to key (column).

    Causal; a completion sees its own prefix and itself. Tokens of one image block see each other
    both ways where the batch has such blocks. ``window``: only keys fewer than so many places
    back. Padded queries see themselves only, so that no softmax runs over nothing.
    """
    tokens = batch.segment_RT.shape[-1]
    rows = torch.arange(tokens, device=batch.segment_RT.device)
    return torch.stack(
        [visible_rows(batch, row, rows, window) for row in range(len(batch.segment_RT))]
    )[:, None]


def visible_rows(
    batch: PrefixBatch, row: int, queries_Q: Tensor, window: int | None = None
) -> Tensor:
    """Bool (Q, T): what the queries at these positions of one row may attend to."""
    segment_T, group_T, place_T = batch.segment_RT[row], batch.group_RT[row], batch.place_RT[row]
    keys_T = torch.arange(len(segment_T), device=segment_T.device)
    queries = queries_Q[:, None]
    seen = keys_T <= queries
    if batch.block_RT is not None:
        block_T = batch.block_RT[row]
        seen = seen | ((block_T == block_T[queries]) & (block_T >= 0))
    segment = segment_T[queries]
    seen = seen & (group_T == group_T[queries]) & ((segment_T == PREFIX) | (segment_T == segment))
    if window is not None:
        seen = seen & (place_T > place_T[queries] - window)
    seen = seen & (segment_T != PADDING) & (segment != PADDING)
    return seen | (keys_T == queries)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows share."""
    shared = 0
    for column in zip(*rows, strict=False):
        if any(token != column[0] for token in column):
            break
        shared += 1
    return shared


def _check(
    prefixes: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    ids: Sequence[Sequence[str]],
) -> None:
    for row, (prefix, branches) in enumerate(zip(prefixes, completions, strict=True)):
        name = ids[row][0] if ids and ids[row] else f"row {row}"
        if not len(prefix):
            raise LayoutError(f"{name}: empty prefix; a row needs its image and prompt")
        if not len(branches):
            raise LayoutError(f"{name}: no completion; a row needs at least one")
        for number, branch in enumerate(branches, start=1):
            if not len(branch):
                raise LayoutError(f"{name}: completion {number} has no token")


def _ragged(rows: list[list[int]], fill: int) -> Tensor:
    """Rows of unequal length as one int64 tensor, filled at the tails."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
