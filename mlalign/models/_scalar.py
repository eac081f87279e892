"""A scalar head on a vision-language model: one number at chosen tokens (a reward, a value).

    r = w . h + b      h: last hidden state, after the final norm, at the token

The head is drawn with deviation 1 / sqrt(width + 1) and bias 0, as in LLaVA-RLHF (2309.14525).
It computes in float32 whatever the dtype of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlalign.branching.batch import PrefixBatch
from mlalign.branching.logps import head_outputs, unwrap

FILE = "scalar_head.safetensors"
"""Lies beside the adapter that it was trained with."""


class ScalarModel(nn.Module):
    """``backbone`` (a transformers model, PEFT-wrapped or not) and a head on its last states."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        width = int(unwrap(backbone).config.get_text_config().hidden_size)
        self.score = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.normal_(self.score.weight, std=(width + 1) ** -0.5)
        nn.init.zeros_(self.score.bias)

    @property
    def config(self) -> Any:
        """The backbone's: DeepSpeed takes sizes from it."""
        return unwrap(self.backbone).config

    def forward(
        self, batch: PrefixBatch, row_M: Tensor, position_M: Tensor, attention: str = "auto"
    ) -> Tensor:
        """(M,) float32: the number at each position of the rows. Gradients flow.

        ``batch``: with features (``VLM.encode``).
        """

        def head(linear: nn.Linear, hidden_RTD: Tensor) -> Tensor:
            return self.score(hidden_RTD[row_M, position_M].float())[..., 0]

        return head_outputs(self.backbone, batch, attention, head)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The backbone's."""
        return bool(self.backbone.is_gradient_checkpointing)

    def gradient_checkpointing_enable(self, **keywords: Any) -> None:
        """The backbone's."""
        self.backbone.gradient_checkpointing_enable(**keywords)

    def gradient_checkpointing_disable(self) -> None:
        """The backbone's."""
        self.backbone.gradient_checkpointing_disable()


def save_head(state: dict[str, Tensor], folder: str | Path) -> None:
    """Write the head out of a model's state into an adapter's folder."""
    tensors = {k: state[f"score.{k}"].detach().float().contiguous() for k in ("weight", "bias")}
    save_file(tensors, Path(folder) / FILE)


def load_head(model: ScalarModel, folder: str | Path) -> None:
    """Take the head that ``save_head`` wrote. Raises FileNotFoundError where there is none."""
    file = Path(folder) / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no scalar head. Name the adapter folder of a reward model that was "
            "trained here"
        )
    model.score.load_state_dict(load_file(file))
