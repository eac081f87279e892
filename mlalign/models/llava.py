"""LLaVA-1.5 and its kin: one square image, a fixed grid of image tokens, a Llama-like decoder.

Serves every ``LlavaForConditionalGeneration`` of transformers, whatever its vision tower.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mlalign.models._family import Family


class Llava(Family):
    """What is particular to the family."""

    architectures = ("LlavaForConditionalGeneration",)

    @classmethod
    def prepare(cls, image: Image.Image, processor: Any, mode: str) -> Image.Image:
        """``mode`` pad: to a square first; crop: as it is."""
        if mode == "pad":
            return pad_to_square(image, _mean_colour(processor.image_processor))
        return image

    @classmethod
    def image_text(cls, processor: Any, size: tuple[int, int]) -> str:
        """One placeholder for every image token; the same number whatever the size."""
        return processor.image_token * image_token_count(processor)

    @classmethod
    def grid(cls, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the image tokens, the same whatever the size."""
        height, width = _input_size(processor)
        return height // processor.patch_size, width // processor.patch_size

    @classmethod
    def patch_mask(
        cls,
        processor: Any,
        box: tuple[float, float, float, float],
        size: tuple[int, int],
        mode: str,
    ) -> Tensor:
        """Bool (P,): the image tokens that ``box`` touches, after the processor's own geometry.

        ``box``: x0, y0, x1, y1 in pixels of the original image of ``size`` (width, height). All
        False where the crop left the box out of view.
        """
        x0, y0, x1, y1 = _into_view(processor, box, size, mode)
        rows, columns = cls.grid(processor, size)
        patch = processor.patch_size
        top = torch.arange(rows)[:, None] * patch
        left = torch.arange(columns)[None, :] * patch
        touched = (left < x1) & (left + patch > x0) & (top < y1) & (top + patch > y0)
        return touched.flatten()


def image_token_count(processor: Any) -> int:
    """Image tokens of one image, as the processor itself counts them."""
    height, width = _input_size(processor)
    count = (height // processor.patch_size) * (width // processor.patch_size)
    count += processor.num_additional_image_tokens
    return count - 1 if processor.vision_feature_select_strategy == "default" else count


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image centred on a square of its longer side, as LLaVA-1.5 was trained."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _mean_colour(image_processor: Any) -> tuple[int, int, int]:
    red, green, blue = (round(255 * value) for value in image_processor.image_mean)
    return red, green, blue


def _input_size(processor: Any) -> tuple[int, int]:
    """(height, width) of what the vision tower sees."""
    image_processor = processor.image_processor
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else None
    size = size or image_processor.size
    if "height" in size:
        return int(size["height"]), int(size["width"])
    return int(size["shortest_edge"]), int(size["shortest_edge"])


def _into_view(
    processor: Any, box: tuple[float, float, float, float], size: tuple[int, int], mode: str
) -> tuple[float, float, float, float]:
    """The box in pixels of the tower's input: pad, resize and centre crop replayed."""
    width, height = size
    x0, y0, x1, y1 = box
    if mode == "pad":
        side = max(size)
        dx, dy = (side - width) // 2, (side - height) // 2
        x0, y0, x1, y1 = x0 + dx, y0 + dy, x1 + dx, y1 + dy
        width = height = side
    target_height, target_width = _input_size(processor)
    resize = processor.image_processor.size
    if "shortest_edge" in resize:
        scale_x = scale_y = int(resize["shortest_edge"]) / min(width, height)
    else:
        scale_x, scale_y = int(resize["width"]) / width, int(resize["height"]) / height
    crop_x = (width * scale_x - target_width) / 2
    crop_y = (height * scale_y - target_height) / 2
    x0, x1 = x0 * scale_x - crop_x, x1 * scale_x - crop_x
    y0, y1 = y0 * scale_y - crop_y, y1 * scale_y - crop_y
    x0, x1 = max(x0, 0.0), min(x1, float(target_width))
    y0, y1 = max(y0, 0.0), min(y1, float(target_height))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else (0.0, 0.0, 0.0, 0.0)


METHOD = Llava
