"""Qwen3-VL: Qwen2-VL's layout, and features that enter several of the first decoder blocks.

Serves ``Qwen3VLForConditionalGeneration``. DeepStack (arXiv 2406.04334): what the tower knows of
an image after some of its blocks is added at the image's tokens after decoder block 0, 1, 2...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mlalign.models.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """What is particular to the family."""

    architectures = ("Qwen3VLForConditionalGeneration",)

    @classmethod
    def frozen_towers(cls, core: Any) -> list[nn.Module]:
        """The tower without its mergers, then the mergers: the model holds both as ``visual``."""
        visual = core.model.visual
        trunk = [visual.patch_embed, visual.pos_embed, *visual.blocks]
        return [
            nn.ModuleList(trunk),
            nn.ModuleList([visual.merger, *visual.deepstack_merger_list]),
        ]

    @classmethod
    def arrange(cls, found: Any, order: Sequence[int]) -> Any:
        """``features`` output for the images in ``order``, those of every deepstack level too."""
        return type(found)(
            pooler_output=[found.pooler_output[i] for i in order],
            deepstack_features=[[level[i] for i in order] for level in found.deepstack_features],
        )


METHOD = Qwen3VL
