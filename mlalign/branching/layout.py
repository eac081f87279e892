"""Lay rows out: one prefix, its completions after it, padding only at the tail.

    row:        [ prefix | completion 1 | ... | completion K | padding ]
    attention:  a completion sees the prefix and itself, never a sibling
    positions:  each completion continues from the last prefix position + 1

Exact, not an approximation: per-token log-probs and gradients equal those of separate unpadded
rows (for dropout 0, and for models whose only mixing over positions is attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from mlalign.branching.batch import PADDING, PREFIX, PrefixBatch


class LayoutError(ValueError):
    """Rows that cannot be laid out exactly."""


def lay_out(
    prefixes: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    pad_id: int,
    pixel_values: Tensor,
    ids: Sequence[Sequence[str]] = (),
    sides: Sequence[Sequence[str]] = (),
) -> PrefixBatch:
    """One row per prefix, its completions after it.

    ``prefixes``: token ids of each row's prefix. ``completions``: for each row, the token ids of
    its completions. ``pixel_values``: one image per row. ``ids``, ``sides``: record id and side of
    each completion, by row. Raises LayoutError for a row without
    completions and for an empty prefix or completion.
    """
    _check(prefixes, completions, ids)
    length = max(len(p) + sum(map(len, cs)) for p, cs in zip(prefixes, completions, strict=True))
    rows = len(prefixes)
    input_ids_RT = torch.full((rows, length), pad_id, dtype=torch.long)
    position_ids_RT = torch.zeros(rows, length, dtype=torch.long)
    segment_RT = torch.full((rows, length), PADDING, dtype=torch.long)
    row_C: list[int] = []
    last_C: list[int] = []
    source: list[list[int]] = []
    target: list[list[int]] = []
    for row, (prefix, branches) in enumerate(zip(prefixes, completions, strict=True)):
        stop = len(prefix)
        input_ids_RT[row, :stop] = torch.as_tensor(prefix)
        position_ids_RT[row, :stop] = torch.arange(stop)
        segment_RT[row, :stop] = PREFIX
        for number, branch in enumerate(branches, start=1):
            start, stop = stop, stop + len(branch)
            input_ids_RT[row, start:stop] = torch.as_tensor(branch)
            position_ids_RT[row, start:stop] = len(prefix) + torch.arange(len(branch))
            segment_RT[row, start:stop] = number
            row_C.append(row)
            # The last prefix position predicts the first token of every completion.
            source.append([len(prefix) - 1, *range(start, stop - 1)])
            target.append(list(branch))
            last_C.append(stop - 1)
    mask_CS = _ragged([[True] * len(t) for t in target], torch.bool)
    return PrefixBatch(
        input_ids_RT=input_ids_RT,
        position_ids_RT=position_ids_RT,
        segment_RT=segment_RT,
        pixel_values=pixel_values,
        row_C=torch.as_tensor(row_C),
        source_CS=_ragged(source, torch.long),
        target_CS=_ragged(target, torch.long),
        mask_CS=mask_CS,
        last_C=torch.as_tensor(last_C),
        ids_C=tuple(chain.from_iterable(ids)),
        sides_C=tuple(chain.from_iterable(sides)),
    )


def attention_mask(segment_RT: Tensor) -> Tensor:
    """Bool (R, 1, T, T), True where query (row) may attend to key (column).

    Causal; a completion sees the prefix and itself. Padded queries see themselves only, so that
    no softmax runs over nothing.
    """
    tokens = segment_RT.shape[-1]
    query, key = segment_RT[:, :, None], segment_RT[:, None, :]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=segment_RT.device).tril()
    visible = (key == PREFIX) | (key == query)
    real = (key != PADDING) & (query != PADDING)
    itself = torch.eye(tokens, dtype=torch.bool, device=segment_RT.device)
    return ((causal & visible & real) | itself)[:, None]


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


def _ragged(rows: list[list], dtype: torch.dtype) -> Tensor:
    """Rows of unequal length as one tensor, zero at the tails."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype)
