"""InternVL (3, 3.5): an image cut into tiles of one size, then the whole of it as one more tile.

    text:  <img> <IMG_CONTEXT> * n * tiles </img>

n is ``image_seq_length``, the tokens of one tile: a square of patches after pixel shuffle. The
tiles' arrangement is the one nearest to the image's shape; where it is a single tile, the whole
is not added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from mlalign.models._family import Family, ImageInputs


class InternVL(Family):
    """What is particular to the family."""

    architectures = ("InternVLForConditionalGeneration",)

    @classmethod
    def inputs(cls, processor: Any, image: Image.Image, mode: str) -> ImageInputs:
        """The tiles of one image.

        Cut whatever ``crop_to_patches`` the image processor's file says: the stock processor
        overrules it, and released files say false.
        """
        seen = cls.prepare(image, processor, mode)
        made = processor.image_processor(images=seen, return_tensors="pt", crop_to_patches=True)
        return ImageInputs({"pixel_values": made["pixel_values"]}, image.size)

    @classmethod
    def collate(cls, images: Sequence[ImageInputs]) -> dict[str, Tensor]:
        """Tiles of all images one after the other, and how many each image has."""
        tiles = [image.tensors["pixel_values"] for image in images]
        counts = torch.tensor([len(each) for each in tiles])
        return {"pixel_values": torch.cat(tiles), "num_patches": counts}

    @classmethod
    def features(cls, core: Any, images: dict[str, Tensor]) -> Any:
        """The model's own, with the tiles of an image put together."""
        found = core.model.get_image_features(images["pixel_values"], return_dict=True)
        tiles = found.pooler_output.split(images["num_patches"].tolist())
        found.pooler_output = [each.flatten(0, 1) for each in tiles]
        return found

    @classmethod
    def arrange(cls, found: Any, order: Sequence[int]) -> Any:
        """One tensor, as this model takes it: the tokens of the images in ``order``."""
        tokens = torch.cat([found.pooler_output[i] for i in order])
        return BaseModelOutputWithPooling(pooler_output=tokens[None])  # type: ignore[arg-type]

    @classmethod
    def placeholder(cls, processor: Any) -> str:
        """The image token itself."""
        return processor.tokenizer.context_image_token

    @classmethod
    def image_text(cls, processor: Any, size: tuple[int, int]) -> str:
        """The tokens of all tiles between the image's two marks."""
        rows, columns = tiling(processor, size)
        tiles = rows * columns + (rows * columns > 1)
        tokenizer = processor.tokenizer
        tokens = cls.placeholder(processor) * (_tokens(processor) * tiles)
        return tokenizer.start_image_token + tokens + tokenizer.end_image_token

    @classmethod
    def grid(cls, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image that is not cut.

        Raises NotImplementedError for one that is: it is seen twice, in tiles and as a whole.
        """
        if tiling(processor, size) != (1, 1):
            raise NotImplementedError(
                f"InternVL: an image of {size} is seen in tiles and as a whole; its tokens have "
                "no single grid. Set max_patches: 1 in the image processor"
            )
        side = math.isqrt(_tokens(processor))
        return side, side

    @classmethod
    def patch_mask(
        cls,
        processor: Any,
        box: tuple[float, float, float, float],
        size: tuple[int, int],
        mode: str,
    ) -> Tensor:
        """Bool (P,): tokens that ``box`` touches, in its tiles and again in the whole image.

        ``box``: x0, y0, x1, y1 in pixels of the original image of ``size`` (width, height).
        """
        side = math.isqrt(_tokens(processor))
        rows, columns = tiling(processor, size)
        down = _touched(box[1] / size[1], box[3] / size[1], rows * side)
        across = _touched(box[0] / size[0], box[2] / size[0], columns * side)
        cut = (down[:, None] & across).reshape(rows, side, columns, side)
        seen = [cut.transpose(1, 2).flatten()]
        if rows * columns > 1:
            down = _touched(box[1] / size[1], box[3] / size[1], side)
            across = _touched(box[0] / size[0], box[2] / size[0], side)
            seen.append((down[:, None] & across).flatten())
        return torch.cat(seen)


def tiling(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of tiles that an image of ``size`` (width, height) is cut into."""
    image_processor = processor.image_processor
    if image_processor.max_patches <= 1:
        return 1, 1
    tile = int(image_processor.size["height"]), int(image_processor.size["width"])
    columns, rows = get_optimal_tiled_canvas(
        size[::-1], tile, image_processor.min_patches, image_processor.max_patches
    )
    return rows, columns


def _touched(start: float, stop: float, cells: int) -> Tensor:
    """Bool (cells,): which equal parts of 0..1 the interval touches."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    return (edges[:-1] < stop) & (edges[1:] > start)


def _tokens(processor: Any) -> int:
    """Image tokens of one tile; the default is the processor class's own."""
    return int(getattr(processor, "image_seq_length", 256))


METHOD = InternVL
