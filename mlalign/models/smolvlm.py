"""SmolVLM 2: Idefics3's tiles and text, under its own class names. Images only, no video."""

from __future__ import annotations

from typing import Any

from mlalign.models.idefics3 import Idefics3


class SmolVLM(Idefics3):
    """What is particular to the family."""

    architectures = ("SmolVLMForConditionalGeneration",)

    @classmethod
    def whole_mark(cls, processor: Any) -> str:
        """The mark before the tokens of the whole image."""
        return getattr(processor, "global_image_token", "<global-img>")


METHOD = SmolVLM
