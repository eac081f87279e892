"""Whether adapter on and adapter off are the same model, number for number.

So it is before the first step: a fresh LoRA's B is zero, and what is added to every output is an
exact zero. One side is then read, and stands for both.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from mlalign.models._vlm import VLM


def adds_nothing(vlm: VLM) -> bool:
    """The same answer on every rank; each must ask, since ZeRO-3 leaves each a part of B.

    True without an adapter. False for whatever is not a plain LoRA with B = 0, whether or not it
    moves the output: another kind of adapter, a variant (DoRA rounds), a trained copy of a module.
    """
    plain = all(_is_silent(module) for module in vlm.model.modules())
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return plain
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, plain)
    return all(ranks)


def _is_silent(module: Any) -> bool:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return False
    if not isinstance(module, BaseTunerLayer):
        return True
    if not isinstance(module, LoraLayer) or module.lora_variant or module.merged_adapters:
        return False
    added = [*module.lora_B.parameters(), *module.lora_embedding_B.parameters()]
    return not any(bool(_own(parameter).any()) for parameter in added)


def _own(parameter: Tensor) -> Tensor:
    """What this rank holds of it."""
    return getattr(parameter, "ds_tensor", parameter)
