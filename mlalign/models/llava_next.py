"""LLaVA-NeXT (LLaVA-1.6): an image whole and in tiles of any resolution, newlines between rows.

Serves every ``LlavaNextForConditionalGeneration``; Mistral, Vicuna, Llama 3 and Qwen decoders. The
layout is that of ``models._anyres``; a 672 x 672 image has 576 + 48 * 49 = 2,928 tokens.
"""

from __future__ import annotations

from typing import Any

from mlalign.models._anyres import AnyRes, tile_size


class LlavaNext(AnyRes):
    """What is particular to the family."""

    architectures = ("LlavaNextForConditionalGeneration",)

    @classmethod
    def side(cls, processor: Any) -> int:
        """Patches along a tile's side."""
        return tile_size(processor) // int(processor.patch_size)

    @classmethod
    def whole(cls, processor: Any) -> int:
        """Patches of a tile, and what the tower adds (CLS) unless the model drops it."""
        count = cls.side(processor) ** 2 + int(processor.num_additional_image_tokens)
        return count - 1 if processor.vision_feature_select_strategy == "default" else count


METHOD = LlavaNext
