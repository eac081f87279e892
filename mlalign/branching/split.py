"""Split attention: exact for rows of branches, without a T x T mask.

For each group of a row,

    prefix and completion 1:   SDPA, causal                       (an ordinary row, flash kernels)
    completions 2..K:          SDPA over [prefix | block], where a block is one long completion, or
                               several short ones under a small mask

so that nothing is computed between siblings but inside a block of short ones. Prefix and block lie
apart in the row: their keys and values are joined by a copy, which the backward pass keeps. On a
CPU, as long as what stands between them is shorter than the prefix, the stretch of the row that
holds both is taken as it is instead, with what is between masked: a little more arithmetic, and
less memory and time than the copy. On CUDA the copy buys the flash kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mlalign.branching.batch import Group, PrefixBatch

NAME = "mlalign"
"""What the project's attention function is called in ``set_attn_implementation``."""

BLOCK = 256
"""Tokens of short completions that share one call."""


@dataclass(frozen=True)
class Branches:
    """Tells ``attend`` to take the split path for the rows of a batch.

    Travels as a keyword of the model's forward, not in a context: gradient checkpointing calls the
    attention again during the backward pass.
    """

    batch: PrefixBatch
    masks: dict[tuple[int, ...], Any] = field(default_factory=dict, compare=False)
    """Masks of blocks, made once for all layers."""


def choose(core: Any, batch: PrefixBatch, attention: str = "auto") -> str:
    """ "dense" or "split". auto: split wherever it is exact for this model and batch.

    Split measured faster than the dense mask at every length tried (800 tokens and more on a CPU),
    and never keeps a T x T mask. Raises ValueError where split is asked for and cannot be exact:
    sliding windows and image blocks need the mask, and so does an attention function that is not
    this one.
    """
    if attention == "dense":
        return "dense"
    reason = ""
    if core.config.get_text_config()._attn_implementation != NAME:
        reason = "the model attends by another function: call branching.attention.use(core)"
    elif batch.windows or batch.block_RT is not None:
        reason = "sliding windows and image blocks need a mask"
    if attention == "split" and reason:
        raise ValueError(f"attention: split is not possible here: {reason}")
    return "dense" if reason else "split"


def split_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branches: Branches,
    keywords: dict[str, Any],
) -> Tensor:
    """(R, T, H, d): group by group, the causal part and then block by block; 0 at padding.

    ``query`` (R, H, T, d), ``key`` and ``value`` (R, G, T, d) with G key-value heads.
    """
    tokens = query.shape[2]
    rows = []
    for row, groups in enumerate(branches.batch.groups_R):
        q, k, v = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        masks = branches.masks
        parts = [part for g in groups for part in _group(module, q, k, v, g, masks, keywords)]
        end = groups[-1].stops[-1]
        if end < tokens:
            parts.append(q.new_zeros(1, tokens - end, q.shape[1], v.shape[-1]))
        rows.append(torch.cat(parts, 1) if len(parts) > 1 else parts[0])
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _group(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group,
    masks: dict[tuple[int, ...], Any],
    keywords: dict[str, Any],
) -> list[Tensor]:
    """Outputs of one group: of prefix and first completion, then of each block of siblings."""
    start, (shared, first, *_) = group.start, group.stops
    row = slice(start, first)
    q1, k1, v1 = q[:, :, row], k[:, :, row], v[:, :, row]
    out = [_sdpa(module, q1, k1, v1, None, is_causal=True, **keywords)]
    for stops in _blocks(group.stops[1:]):
        own = slice(stops[0], stops[-1])
        between = stops[0] - shared
        if between <= shared - start and q.device.type != "cuda":
            keys, values = (x[:, :, start : stops[-1]] for x in (k, v))
        else:
            keys, values = (torch.cat([x[:, :, start:shared], x[:, :, own]], 2) for x in (k, v))
            between = 0
        name = (shared - start, between, *(stop - stops[0] for stop in stops))
        if name not in masks:
            masks[name] = _block_mask(stops, shared - start, between, q.device)
        queries, mask = q[:, :, own], masks[name]
        out.append(_sdpa(module, queries, keys, values, mask, is_causal=False, **keywords))
    return out


def _sdpa(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **keywords: Any) -> Tensor:
    """(1, queries, H, d)."""
    return sdpa_attention_forward(module, q, k, v, mask, **keywords)[0]


def _blocks(stops: Sequence[int]) -> Iterator[list[int]]:
    """Boundaries of the completions after the first, in blocks of at most BLOCK tokens or of one
    completion: few calls for many short completions, no waste for few long ones."""
    block = [stops[0]]
    for stop in stops[1:]:
        if len(block) > 1 and stop - block[0] > BLOCK:
            yield block
            block = [block[-1]]
        block.append(stop)
    if len(block) > 1:
        yield block


def _block_mask(stops: Sequence[int], prefix: int, between: int, device: torch.device) -> Any:
    """What a block's queries see of [prefix | between | block]: the prefix, and their own
    completion."""
    length = stops[-1] - stops[0]
    if length == 1 and not between:
        return None  # one query sees all keys
    if len(stops) == 2 and device.type == "cuda":
        return causal_lower_right(length, prefix + length)
    lengths = torch.tensor([b - a for a, b in itertools.pairwise(stops)], device=device)
    number = torch.repeat_interleave(lengths, output_size=length)
    own = (number[:, None] == number).tril()
    parts = [own.new_ones(length, prefix), own.new_zeros(length, between), own]
    return torch.cat(parts, 1)[None, None]
