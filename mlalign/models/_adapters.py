"""Which of a model's adapters is at work, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


@contextlib.contextmanager
def adapter_in_place(model: nn.Module, name: str | None) -> Iterator[None]:
    """``name`` is the active adapter inside; None: none is, the model is its frozen base.

    ``requires_grad`` stays as it is. PEFT's own switches leave that of the active adapter alone
    set, so that a second one would train no more.
    """
    layers: list[Any] = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter = layer._active_adapter if name is None else [name]
        layer._disable_adapters = name is None
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled
