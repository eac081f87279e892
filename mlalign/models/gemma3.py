"""Gemma 3: one square image, a fixed grid of image tokens that see each other both ways.

    full layers:     causal, or within the image block
    sliding layers:  the same, and fewer than ``sliding_window`` tokens back

so each kind of layer has a mask of its own (``PrefixBatch.windows``), and rows of branches take the
dense path. Pan and scan (further crops of long images) is off, as the stock processor has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mlalign.branching.layout import LayoutError
from mlalign.models._family import Family, ImageInputs


class Gemma3(Family):
    """What is particular to the family."""

    architectures = ("Gemma3ForConditionalGeneration",)

    @classmethod
    def inputs(cls, processor: Any, image: Image.Image, mode: str) -> ImageInputs:
        """(1, 3, height, width) pixels.

        Raises ValueError where the processor was told to pan and scan.
        """
        # The processor's own settings win over those in the image processor's file.
        settings = dict(processor.images_kwargs)
        if settings.get("do_pan_and_scan"):
            raise ValueError(
                "Gemma3: do_pan_and_scan cuts a long image into crops, and each crop is an image "
                "of its own in the prompt; one image per prompt is served. Set it to false"
            )
        seen = cls.prepare(image, processor, mode)
        made = processor.image_processor(images=seen, return_tensors="pt", **settings)
        return ImageInputs({key: made[key] for key in cls.keys(made)}, image.size)

    @classmethod
    def arrange(cls, found: Any, order: Sequence[int]) -> Any:
        """(images, P, D): the model takes one tensor."""
        pooled = torch.stack([found.pooler_output[i] for i in order])
        return BaseModelOutputWithPooling(pooler_output=pooled)  # type: ignore[arg-type]

    @classmethod
    def image_text(cls, processor: Any, size: tuple[int, int]) -> str:
        """Begin mark, image tokens and end mark between blank lines, whatever the size."""
        return processor.full_image_sequence

    @classmethod
    def generation(
        cls, ids_RT: Tensor, image_token_id: int, images: Sequence[ImageInputs]
    ) -> dict[str, Tensor]:
        """Which tokens are the image's: they see each other both ways while the prompt is read."""
        return {"token_type_ids": (ids_RT == image_token_id).long()}

    @classmethod
    def image_blocks(cls, core: Any) -> bool:
        """True. Raises LayoutError for a text model that is not causal: a prefix would see what
        follows it."""
        if core.config.get_text_config().use_bidirectional_attention:
            raise LayoutError(
                "text_config.use_bidirectional_attention is true: the prefix sees the completions, "
                "so it cannot be shared. Use a causal model"
            )
        return True

    @classmethod
    def grid(cls, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the image tokens, the same whatever the size."""
        side = math.isqrt(processor.image_seq_length)
        return side, side

    @classmethod
    def patch_mask(
        cls,
        processor: Any,
        box: tuple[float, float, float, float],
        size: tuple[int, int],
        mode: str,
    ) -> Tensor:
        """Bool (P,): the image tokens that ``box`` touches; the image is squeezed to a square.

        ``box``: x0, y0, x1, y1 in pixels of the original image of ``size`` (width, height).
        """
        rows, columns = cls.grid(processor, size)
        left = torch.arange(columns, dtype=torch.float64) * size[0] / columns
        top = torch.arange(rows, dtype=torch.float64) * size[1] / rows
        across = (left < box[2]) & (left + size[0] / columns > box[0])
        down = (top < box[3]) & (top + size[1] / rows > box[1])
        return (down[:, None] & across).flatten()


METHOD = Gemma3
