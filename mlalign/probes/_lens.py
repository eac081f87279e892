"""Read hidden states through the final norm and the head (logit lens).

    logits = norm(h) W_U^T

Applied to a block's output; the last hidden state of ``transformers`` is normed already, so it goes
in with ``normed=True``. At the last block the lens gives the model's own logits.

The weights are the base model's where there is an adapter, on both sides alike: also where the
adapter trains a copy of the norm or the head. Without an adapter they are those of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from mlalign.models._vlm import VLM
from mlalign.probes._weights import gathered

CHUNK = 512
"""States whose logits over the whole vocabulary are held at one time."""


@dataclass(frozen=True, kw_only=True)
class Lens:
    """The final norm and the head of a model."""

    norm: Callable[[Tensor], Tensor]
    """(..., D) -> (..., D), of the base model's weights."""
    head_VD: Tensor
    """Unembedding, in the model's dtype, on its device."""
    bias_V: Tensor | None = None

    def logits(self, states_ND: Tensor, *, normed: bool = False) -> Tensor:
        """(N, V) float32."""
        states_ND = states_ND if normed else self.norm(states_ND)
        logits_NV = torch.nn.functional.linear(states_ND.to(self.head_VD.dtype), self.head_VD)
        return logits_NV.float() if self.bias_V is None else logits_NV.float() + self.bias_V.float()

    def log_probs(self, states_ND: Tensor, *, normed: bool = False) -> Iterator[Tensor]:
        """(at most CHUNK, V) log-probs, float32, in the order of the states."""
        for part_ND in states_ND.split(CHUNK):
            yield torch.log_softmax(self.logits(part_ND, normed=normed), dim=-1)


def lens_of(vlm: VLM) -> Lens:
    """The lens of a model, whole on this rank. Every rank must call it: ZeRO-3 gathers.

    The norm is copied; the head is where it can be the model's own weight, so a lens is not to be
    kept over a training step. Raises ValueError, naming what is missing, for a language model
    without a final norm or a linear head.
    """
    norm, head = refuse_without_lens(vlm)
    parameters = [*norm.parameters(), *head.parameters()]
    sharded = any(hasattr(parameter, "ds_id") for parameter in parameters)
    with gathered(parameters), torch.no_grad():
        weight_VD = dequantize_module_weight(head).detach()
        bias_V = None if head.bias is None else head.bias.detach()
        if sharded:
            weight_VD = weight_VD.clone()
            bias_V = None if bias_V is None else bias_V.clone()
        return Lens(norm=_copied(norm), head_VD=weight_VD, bias_V=bias_V)


def refuse_without_lens(vlm: VLM) -> tuple[nn.Module, Any]:
    """The base model's final norm and linear head; raises ValueError as ``lens_of`` does."""
    norm, head = _base(_final_norm(vlm)), _base(vlm.core.get_output_embeddings())
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the output head is a {type(head).__name__}, not a linear layer")
    return norm, head


def _final_norm(vlm: VLM) -> nn.Module:
    """The language model's norm after its last block. Raises ValueError where it has none."""
    language = getattr(vlm.core.model, vlm.family.language_model)
    for name in ("norm", "final_layernorm", "ln_f"):
        if hasattr(language, name):
            return getattr(language, name)
    kind = vlm.core.config.get_text_config().model_type
    raise ValueError(f"{kind} has no final norm that is called norm, beside its layers")


def _base(module: Any) -> Any:
    """The base model's module inside PEFT's wrappers."""
    if hasattr(module, "original_module"):
        return module.original_module
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _copied(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm's arithmetic on copied weights, without the hooks that may stand on the module."""
    bare: Any = type(norm).__new__(type(norm))
    nn.Module.__init__(bare)
    for name, value in vars(norm).items():
        if not name.startswith("_") and isinstance(value, (int, float, str, tuple)):
            setattr(bare, name, value)
    for name, parameter in norm.named_parameters():
        bare.register_parameter(name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return bare.eval()
