"""Columns of keys hidden from later rows in chosen blocks: attention knock-out.

    with using(vlm.core), hide_columns(vlm.layers[:8], image_RT):
        model(...)

In the blocks that are named, no query outside of the columns attends to them; the columns still see
each other, and every other block is as it was. So with all blocks and the image's columns, nothing
of the pixels reaches the answer; with some blocks, what is lost is what those blocks fetch directly
(information that an earlier block has moved on is kept).

A hidden block attends under a mask whichever path the others take: split attention falls back to
the dense mask, which is exact as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from mlalign.branching.layout import attention_mask
from mlalign.branching.split import Branches


class _Hidden:
    """What ``hide_columns`` hides, and from which attention modules."""

    def __init__(self, layers: Collection[nn.Module], columns_RT: Tensor) -> None:
        self.modules = {id(layer.self_attn) for layer in layers}
        self.columns_RT = columns_RT
        self.masks: dict[int, tuple[object, Tensor]] = {}
        """The mask of every source of masks, made once for all layers; the source is held, so that
        its id stays its own."""

    def mask(self, query: Tensor, mask: Tensor | None, branches: Branches | None) -> Tensor:
        source: object = mask if branches is None else branches
        if id(source) not in self.masks:
            self.masks[id(source)] = source, self._make(query, mask, branches)
        return self.masks[id(source)][1]

    def _make(self, query: Tensor, mask: Tensor | None, branches: Branches | None) -> Tensor:
        rows, tokens = query.shape[0], query.shape[2]
        if self.columns_RT.shape != (rows, tokens):
            raise ValueError(
                f"hide_columns got columns {tuple(self.columns_RT.shape)}, the batch has {rows} "
                f"rows of {tokens} tokens: give one mask of columns per row"
            )
        columns_RT = self.columns_RT.to(query.device)
        hidden = (columns_RT[:, None, :] & ~columns_RT[:, :, None])[:, None]
        if branches is not None:
            mask = attention_mask(branches.batch)
        elif mask is None:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        if mask.dtype == torch.bool:
            return mask & ~hidden
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


_open: _Hidden | None = None


@contextlib.contextmanager
def hide_columns(layers: Collection[nn.Module], columns_RT: Tensor) -> Iterator[None]:
    """Hide ``columns_RT`` (bool) from all other positions in these decoder blocks, inside.

    ``layers``: blocks with ``self_attn``; none of them leaves the forward as it is. The model must
    attend by the project's function (``attention.using``). Raises RuntimeError where one is open,
    and ValueError where rows or tokens are not those of the batch.
    """
    global _open
    if _open is not None:
        raise RuntimeError("hide_columns is already open: forwards do not nest")
    _open = _Hidden(layers, columns_RT)
    try:
        yield
    finally:
        _open = None


def hidden_mask(
    module: nn.Module, query: Tensor, mask: Tensor | None, branches: Branches | None
) -> Tensor | None:
    """The mask under which this module must attend instead; None where nothing is hidden from it.

    ``query``: (R, H, T, d).
    """
    if _open is None or id(module) not in _open.modules:
        return None
    return _open.mask(query, mask, branches)
