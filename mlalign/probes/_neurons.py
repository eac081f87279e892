"""The neurons of gated MLPs: where they are, and the weights that they write with.

A neuron i of a block is one column of ``down_proj``: the block adds sum_i a_i W_down[:, i] to the
residual stream, a = act(W_gate x) * (W_up x). ``a`` is its coefficient; it fires where
act(W_gate x) > 0.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from mlalign.models._vlm import VLM


def gated_mlps(vlm: VLM, probe: str) -> list[Any]:
    """The MLP of every decoder block. Raises ValueError, naming ``probe``, where one has no gate or
    no activation function of its own."""
    mlps: list[Any] = [getattr(layer, "mlp", None) for layer in vlm.layers]
    for number, mlp in enumerate(mlps):
        for name in ("gate_proj", "down_proj", "act_fn"):
            if not hasattr(mlp, name):
                raise ValueError(
                    f"{probe}: layer {number} has no mlp.{name}; only gated MLPs (Llama, Mistral, "
                    "Qwen2) are read. Leave the probe out of probes.methods"
                )
    return mlps


def base_weight(linear: Any) -> Tensor:
    """(out, in) float32 of the frozen weight; inside ``gathered`` of ``base_parameters``."""
    inner = linear.get_base_layer() if isinstance(linear, LoraLayer) else linear
    return dequantize_module_weight(inner).detach().float()


def parameters_of(linear: Any) -> list[Any]:
    """What must be whole for ``base_weight`` and ``updates``, always in the same order."""
    inner = linear.get_base_layer() if isinstance(linear, LoraLayer) else linear
    pairs = [p for name in _adapters(linear) for p in _factors(linear, name)]
    return [inner.weight, *pairs]


def updates(linear: Any) -> list[tuple[Tensor, Tensor, float]]:
    """(B (out, r), A (r, in), scaling) of each active LoRA adapter, float32."""
    found = []
    for name in _adapters(linear):
        down, up = _factors(linear, name)
        found.append((up.detach().float(), down.detach().float(), float(linear.scaling[name])))
    return found


def _adapters(linear: Any) -> list[str]:
    if not isinstance(linear, LoraLayer):
        return []
    return [name for name in linear.active_adapters if name in linear.lora_A]


def _factors(linear: Any, name: str) -> tuple[Any, Any]:
    return linear.lora_A[name].weight, linear.lora_B[name].weight


def written(linear: Any, rows_MD: Tensor) -> tuple[Tensor, Tensor]:
    """rows W and rows (W + s B A), each (M, in) float32; one tensor twice without an adapter."""
    rows_MD = rows_MD.float()
    base_MF = rows_MD @ base_weight(linear).to(rows_MD.device)
    adapted_MF = base_MF
    for up, down, scaling in updates(linear):
        adapted_MF = adapted_MF + scaling * (rows_MD @ up) @ down
    return base_MF, adapted_MF


def columns(linear: Any, neurons: list[int]) -> Tensor:
    """(out, len(neurons)) float32: the frozen weight's columns."""
    return base_weight(linear)[:, torch.as_tensor(neurons, dtype=torch.long)]
