"""The weights that an adapter changes, with the adapter added: what another copy of a model needs.

    W' = W + scale * B A

Nothing is merged in place: the frozen base also serves the reference and the reward model, and
adding and taking off again leaves a rounding error at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""


def changed_weights(
    model: nn.Module, adapter: str = "default", *, shapes_only: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name as in the model without an adapter, weight in the base's dtype), one at a time.

    ``shapes_only``: the bases' own weights, which have the dtypes and shapes of the others. Raises
    ValueError for a base whose weights are quantised, and for modules that PEFT trains whole.
    """
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"{name} is trained whole: the engine sends what LoRA adds, alone")
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        base: Any = module.get_base_layer()
        if not base.weight.is_floating_point():
            raise ValueError(
                f"{name} is quantised: its weight cannot be sent. Set model.quantize: none"
            )
        found += 1
        weight = base.weight.detach()
        if not shapes_only:
            layer: Any = module
            weight = (weight + layer.get_delta_weight(adapter)).detach().to(weight.dtype)
        yield f"{name.removeprefix(PREFIX)}.weight", weight
    if not found:
        raise ValueError(f"the model has no adapter {adapter!r}: nothing was trained")
