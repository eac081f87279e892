"""Weights as a whole, where ZeRO-3 leaves each rank a part of them; and the modules with LoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def gathered(parameters: Sequence[Tensor]) -> Any:
    """Context with whole weights inside: under ZeRO-3 every rank must open it, in the same order.

    What is read must be copied before the context ends.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def lora_modules(model: nn.Module) -> list[tuple[str, Any, str]]:
    """(name, module, active adapter) of every linear that carries a LoRA update."""
    return [
        (name.removeprefix("base_model.model."), module, adapter)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for adapter in module.active_adapters
        if adapter in module.lora_A
    ]
