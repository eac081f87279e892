"""Attention of one answer by an independent way: a plain row, one forward, eager attention."""

from __future__ import annotations

import torch
from torch import Tensor

from mlalign.models._vlm import VLM
from mlalign.probes._probe import Item, ProbeBatch


def attention(vlm: VLM, item: Item, completion: int) -> Tensor:
    """(L, H, T, T) of the row [prefix | completion]; leaves the model attending eagerly."""
    vlm.core.set_attn_implementation("eager")
    with torch.no_grad():
        out = vlm.model(
            input_ids=torch.tensor([item.prefix + item.completions[completion]]),
            pixel_values=item.image.tensors["pixel_values"],
            output_attentions=True,
        )
    return torch.stack([each[0] for each in out.attentions])


def image_columns(vlm: VLM, item: Item, completion: int) -> Tensor:
    """Bool (T,) of that row."""
    return torch.tensor(item.prefix + item.completions[completion]) == vlm.image_token_id


def uniform_in(vlm: VLM, layer: int) -> VLM:
    """The same with no queries in a layer: every row attends evenly to all that it may see."""
    with torch.no_grad():
        vlm.core.model.language_model.layers[layer].self_attn.q_proj.weight.zero_()
    return vlm


def uniform_rows(batch: ProbeBatch, row: int, heads: int = 2) -> Tensor:
    """(H, Q, T) as such a layer would hand out for the answers' tokens."""
    segment_T = batch.rows.segment_RT[row]
    rows = []
    for completion, positions in enumerate(batch.queries(row)):
        for position in positions.tolist():
            seen = (segment_T == 0) | (segment_T == completion + 1)
            seen &= torch.arange(len(segment_T)) <= position
            rows.append(seen.float() / seen.sum())
    return torch.stack(rows).expand(heads, -1, -1)
