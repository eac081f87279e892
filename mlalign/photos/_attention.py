"""Attention for training on a CPU in bfloat16: two batched matrix products and a softmax.

Rows here have a few hundred tokens, and on a CPU the bfloat16 backward of torch's fused attention
costs more than twice as much at that length (measured, 327 tokens, one core: 44 against 105 ms for
forward and backward of one layer). Needs the additive 4-D mask of ``branching.logps``; training
only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

NAME = "mlalign_matmul"
"""What it is called in ``set_attn_implementation``."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling + mask) v; heads last but one, as transformers wants it."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        raise ValueError(f"{NAME} needs the additive 4-D mask of a laid-out batch")
    groups = getattr(module, "num_key_value_groups", 1)
    rows, heads, tokens, width = query.shape
    flat = (rows * heads, tokens, width)
    keys = repeat_kv(key, groups).reshape(flat)
    values = repeat_kv(value, groups).reshape(flat)
    mask = attention_mask.expand(rows, heads, tokens, tokens).reshape(-1, tokens, tokens)
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(mask, query.reshape(flat), keys.transpose(1, 2), alpha=scale)
    out = torch.bmm(scores.softmax(-1), values).view(rows, heads, tokens, width)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
