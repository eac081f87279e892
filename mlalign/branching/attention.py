"""The one attention function registered with transformers, and the rows that probes ask for.

Two exact paths. Dense: SDPA under the mask that the model was given. Split, for rows of branches:
SDPA of prefix and first completion, causal, without a mask; then the other completions, each block
of them over the prefix and itself. Split needs no T x T mask, computes nothing between siblings
and keeps the flash kernels; which one runs is chosen by ``choose``.

    with using(vlm.core), capture_rows(vlm.layers, positions, sink):
        model(...)

The output of every layer is SDPA's own. Only inside ``capture_rows``, and only for the decoder
blocks it names, the wanted query rows are computed a second time in float32,

    A[h, q, :] = softmax(q_h k_h^T * scaling + mask),

and handed to the sink one row of the batch at a time, to be reduced at once. 16 rows of 700 cost
0.03 % of a forward pass; eager attention would keep a T x T matrix per head and layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mlalign.branching.knockout import hidden_mask
from mlalign.branching.layout import visible_rows
from mlalign.branching.split import NAME, Branches, split_attention

RowSink = Callable[[int, int, Tensor], None]
"""Called with (layer from 0, row of the batch, weights (H, Q, T) float32 without gradient)."""

Wanted = tuple[Sequence[Tensor], RowSink]
"""Positions, one tensor per row of the batch, and who takes their attention."""

_SCORES = ("softcap", "s_aux", "position_bias")
_EXTRAS = (*_SCORES, "sliding_window")
"""Keywords of attention functions that change the weights in ways not recomputed here. A sliding
window is no hindrance where it stands in the mask."""


class _Rows:
    """What ``capture_rows`` wants: of which blocks, at which positions, and who takes it."""

    def __init__(self, layers: Sequence[nn.Module], wanted: Sequence[Wanted]) -> None:
        self.layer_of = {id(layer.self_attn): number for number, layer in enumerate(layers)}
        self.wanted = [([row.cpu() for row in rows], sink) for rows, sink in wanted]

    @torch.no_grad()
    def see(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float,
        branches: Branches | None,
    ) -> None:
        """Hand out this module's rows, where it is one of the wanted blocks."""
        layer = self.layer_of.get(id(module))
        if layer is None:
            return
        for rows, sink in self.wanted:
            if len(rows) != query.shape[0]:
                raise ValueError(
                    f"capture_rows got positions for {len(rows)} rows, the batch has "
                    f"{query.shape[0]}: give one tensor of positions per row"
                )
            for number, positions in enumerate(rows):
                index = positions.to(query.device)
                if branches is not None:
                    mask_rows = visible_rows(branches.batch, number, index)[None]
                elif mask is not None:
                    mask_rows = mask[number if len(mask) > 1 else 0][:, index]
                else:
                    mask_rows = None
                weights_HQT = attention_rows(query[number], key[number], mask_rows, index, scaling)
                sink(layer, number, weights_HQT)


_open: _Rows | None = None


@contextlib.contextmanager
def capture_rows(
    layers: Sequence[nn.Module],
    positions: Sequence[Tensor],
    sink: RowSink,
    also: Sequence[Wanted] = (),
) -> Iterator[None]:
    """Hand the attention of chosen query positions to ``sink`` during the forwards inside.

    ``layers``: decoder blocks (each with ``self_attn``), numbered as given. ``positions``: int64,
    one tensor per row of the batch. The row that *produces* the token at position t is t - 1.
    ``also``: further positions for other takers; computed apart, so that what one is given does not
    depend, by rounding, on what another asks for.
    The model must attend by this function (``using``). Raises RuntimeError where one is open.
    """
    global _open
    if _open is not None:
        raise RuntimeError("capture_rows is already open: forwards do not nest")
    _open = _Rows(layers, [(positions, sink), *also])
    try:
        yield
    finally:
        _open = None


def attention_rows(
    query_HTd: Tensor,
    key_GTd: Tensor,
    mask_rows: Tensor | None,
    positions_Q: Tensor,
    scaling: float,
) -> Tensor:
    """(H, Q, T) float32: attention of one batch row at the query positions.

    ``key_GTd`` has G key-value heads, each serving H / G query heads. ``mask_rows``: bool (True
    may be attended) or additive, (1 or H, Q, T); None means causal over as many keys as queries,
    or one query that sees all keys.
    """
    heads, queries, _ = query_HTd.shape
    keys = key_GTd.shape[1]
    key_HTd = key_GTd.float().repeat_interleave(heads // key_GTd.shape[0], dim=0)
    scores_HQT = query_HTd[:, positions_Q].float() @ key_HTd.transpose(1, 2) * scaling
    if mask_rows is None:
        if queries not in (1, keys):
            raise ValueError(f"no mask for {queries} queries over {keys} keys: give a 4-D mask")
        if queries > 1:
            later = torch.arange(keys, device=query_HTd.device) > positions_Q[:, None]
            scores_HQT = scores_HQT.masked_fill(later, float("-inf"))
    elif mask_rows.dtype == torch.bool:
        scores_HQT = scores_HQT.masked_fill(~mask_rows, float("-inf"))
    else:
        scores_HQT = scores_HQT + mask_rows.float()
    return scores_HQT.softmax(-1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    branches: Branches | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention, as transformers calls it, by either path, without what an open ``hide_columns``
    hides; and the rows of an open ``capture_rows``. Returns (R, T, H, d)."""
    keywords = {**keywords, "dropout": dropout, "scaling": scaling}
    hidden = hidden_mask(module, query, attention_mask, branches)
    if hidden is not None:
        attention_mask, branches = hidden, None
    if branches is None:
        out = sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)[0]
    else:
        out = split_attention(module, query, key, value, branches, keywords)
    if _open is not None:
        for extra in _EXTRAS:
            if keywords.get(extra) is not None and (attention_mask is None or extra in _SCORES):
                raise ValueError(f"attention with {extra} cannot be read row by row yet")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        _open.see(module, query, key, attention_mask, scale, branches)
    return out, None


def use(core: Any) -> None:
    """Make the language model of ``core`` attend by this function; the vision tower stays as it is.

    Raises ValueError as ``refuse`` does: soft-capped scores and sinks are not a plain softmax over
    the mask. A sliding window is, where it stands in the mask.
    """
    refuse(core)
    core.set_attn_implementation({"text_config": NAME})


@contextlib.contextmanager
def using(core: Any) -> Iterator[None]:
    """``use`` inside the context; the implementation that was set before comes back after it."""
    before = core.config.get_text_config()._attn_implementation
    if before == NAME:
        refuse(core)
        yield
        return
    use(core)
    try:
        yield
    finally:
        core.set_attn_implementation({"text_config": before})


def refuse(core: Any) -> None:
    """Raise ValueError, naming the feature, where ``attention_rows`` would not be the weights."""
    text = core.config.get_text_config()
    kind = getattr(text, "model_type", type(text).__name__)
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"{kind}: soft-capped attention scores (attn_logit_softcapping)")
    for name, module in core.named_modules():
        if getattr(module, "sinks", None) is not None:
            raise ValueError(f"{kind}: attention sinks ({name}.sinks)")


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
