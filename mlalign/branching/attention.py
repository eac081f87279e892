"""The one attention function registered with transformers: SDPA, and the rows that probes ask for.

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

NAME = "mlalign"
"""What this function is called in ``set_attn_implementation``."""

RowSink = Callable[[int, int, Tensor], None]
"""Called with (layer from 0, row of the batch, weights (H, Q, T) float32 without gradient)."""

_EXTRAS = ("softcap", "s_aux", "sliding_window", "position_bias")
"""Keywords of attention functions that change the weights in ways not recomputed here."""


class _Rows:
    """What ``capture_rows`` wants: of which blocks, at which positions, and who takes it."""

    def __init__(self, layers: Sequence[nn.Module], rows: Sequence[Tensor], sink: RowSink) -> None:
        self.layer_of = {id(layer.self_attn): number for number, layer in enumerate(layers)}
        self.rows = [row.cpu() for row in rows]
        self.sink = sink

    @torch.no_grad()
    def see(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        """Hand out this module's rows, where it is one of the wanted blocks."""
        layer = self.layer_of.get(id(module))
        if layer is None:
            return
        if len(self.rows) != query.shape[0]:
            raise ValueError(
                f"capture_rows got positions for {len(self.rows)} rows, the batch has "
                f"{query.shape[0]}: give one tensor of positions per row"
            )
        for number, positions in enumerate(self.rows):
            index = positions.to(query.device)
            row_mask = None if mask is None else mask[number if mask.shape[0] > 1 else 0]
            weights_HQT = attention_rows(query[number], key[number], row_mask, index, scaling)
            self.sink(layer, number, weights_HQT)


_open: _Rows | None = None


@contextlib.contextmanager
def capture_rows(
    layers: Sequence[nn.Module], positions: Sequence[Tensor], sink: RowSink
) -> Iterator[None]:
    """Hand the attention of chosen query positions to ``sink`` during the forwards inside.

    ``layers``: decoder blocks (each with ``self_attn``), numbered as given. ``positions``: int64,
    one tensor per row of the batch. The row that *produces* the token at position t is t - 1.
    The model must attend by this function (``using``). Raises RuntimeError where one is open.
    """
    global _open
    if _open is not None:
        raise RuntimeError("capture_rows is already open: forwards do not nest")
    _open = _Rows(layers, positions, sink)
    try:
        yield
    finally:
        _open = None


def attention_rows(
    query_HTd: Tensor, key_GTd: Tensor, mask: Tensor | None, positions_Q: Tensor, scaling: float
) -> Tensor:
    """(H, Q, T) float32: attention of one batch row at the query positions.

    ``key_GTd`` has G key-value heads, each serving H / G query heads. ``mask``: bool (True may be
    attended) or additive, (1 or H, T, T); None means causal over as many keys as queries, or one
    query that sees all keys.
    """
    heads, queries, _ = query_HTd.shape
    keys = key_GTd.shape[1]
    key_HTd = key_GTd.float().repeat_interleave(heads // key_GTd.shape[0], dim=0)
    scores_HQT = query_HTd[:, positions_Q].float() @ key_HTd.transpose(1, 2) * scaling
    if mask is None:
        if queries not in (1, keys):
            raise ValueError(f"no mask for {queries} queries over {keys} keys: give a 4-D mask")
        if queries > 1:
            later = torch.arange(keys, device=query_HTd.device) > positions_Q[:, None]
            scores_HQT = scores_HQT.masked_fill(later, float("-inf"))
    elif mask.dtype == torch.bool:
        scores_HQT = scores_HQT.masked_fill(~mask[:, positions_Q], float("-inf"))
    else:
        scores_HQT = scores_HQT + mask[:, positions_Q].float()
    return scores_HQT.softmax(-1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """SDPA, as transformers calls it; and the rows of an open ``capture_rows``."""
    out = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
    )
    if _open is not None:
        for extra in _EXTRAS:
            if keywords.get(extra) is not None:
                raise ValueError(f"attention with {extra} cannot be read row by row yet")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        _open.see(module, query, key, attention_mask, scale)
    return out


def use(core: Any) -> None:
    """Make the language model of ``core`` attend by this function; the vision tower stays as it is.

    Raises ValueError as ``refuse`` does: soft-capped scores, sinks and sliding windows are not a
    plain softmax over the mask.
    """
    refuse(core)
    core.set_attn_implementation({"text_config": NAME})


@contextlib.contextmanager
def using(core: Any) -> Iterator[None]:
    """``use`` inside the context; the implementation that was set before comes back after it."""
    before = core.config.text_config._attn_implementation
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
    text = core.config.text_config
    kind = getattr(text, "model_type", type(text).__name__)
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"{kind}: soft-capped attention scores (attn_logit_softcapping)")
    windows = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    windows = windows or getattr(text, "sliding_window", None) is not None
    if windows and getattr(text, "use_sliding_window", True):
        raise ValueError(f"{kind}: sliding-window attention (sliding_window)")
    for name, module in core.named_modules():
        if getattr(module, "sinks", None) is not None:
            raise ValueError(f"{kind}: attention sinks ({name}.sinks)")


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
