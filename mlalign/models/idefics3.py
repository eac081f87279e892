"""Idefics3, and SmolVLM's first version: an image as tiles of one size, and the whole of it last.

    text:   for each row of tiles, for each tile  <fake><row_i_col_j><image> * n, then a line end;
            a line end, <fake><global-img><image> * n <fake>
    or, for an image that is not split,           <fake><global-img><image> * n <fake>

n is ``image_seq_len``, the tokens of one tile: a square of patches after pixel shuffle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    get_resize_output_image_size,
)

from mlalign.models._family import Family, ImageInputs

FAINT = 2.0**-14
"""In units of the image's standard deviation: below a hundredth of a grey level, and a normal
number in every dtype."""


class Tiling(NamedTuple):
    """How an image is cut."""

    rows: int
    """Rows of tiles; 0 where the image is not split."""
    columns: int
    width: int
    """Pixels of the image that is cut, after its resizing."""
    height: int


class Idefics3(Family):
    """What is particular to the family."""

    architectures = ("Idefics3ForConditionalGeneration",)
    language_model = "text_model"
    towers = ("vision_model", "connector")

    @classmethod
    def keys(cls, made: Any) -> list[str]:
        """Pixels, and their mask where the image processor pads."""
        return [key for key in ("pixel_values", "pixel_attention_mask") if key in made]

    @classmethod
    def blank(cls, inputs: ImageInputs) -> ImageInputs:
        """The same tiles, all of the processor's mean colour but for a trace that no image could
        have: the model takes a tile of zeros for padding and drops it."""
        pixels = torch.full_like(inputs.tensors["pixel_values"], FAINT)
        return ImageInputs({**inputs.tensors, "pixel_values": pixels}, inputs.size)

    @classmethod
    def collate(cls, images: Sequence[ImageInputs]) -> dict[str, Tensor]:
        """(images, most tiles, ...), tiles of zeros at the tails, as the model itself expects."""
        most = max(image.tensors["pixel_values"].shape[1] for image in images)

        def padded(tiles: Tensor) -> Tensor:
            missing = tiles.new_zeros(1, most - tiles.shape[1], *tiles.shape[2:])
            return torch.cat([tiles, missing], 1)

        return {
            key: torch.cat([padded(image.tensors[key]) for image in images])
            for key in images[0].tensors
        }

    @classmethod
    def image_text(cls, processor: Any, size: tuple[int, int]) -> str:
        """Tiles row by row, each under its own mark, and the whole image after them."""
        fake = getattr(processor, "fake_image_token", "<fake_token_around_image>")
        tokens = cls.placeholder(processor) * _tokens(processor)
        cut = tiling(processor.image_processor, size)
        lines = [
            "".join(f"{fake}<row_{i + 1}_col_{j + 1}>{tokens}" for j in range(cut.columns)) + "\n"
            for i in range(cut.rows)
        ]
        if lines:
            lines.append("\n")
        return "".join(lines) + fake + cls.whole_mark(processor) + tokens + fake

    @classmethod
    def whole_mark(cls, processor: Any) -> str:
        """The mark before the tokens of the whole image."""
        return getattr(processor, "global_image_tag", "<global-img>")

    @classmethod
    def placeholder(cls, processor: Any) -> str:
        """One token, in the template and in the text that takes its place."""
        return getattr(processor, "image_token", "<image>")

    @classmethod
    def grid(cls, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image that is not split.

        Raises NotImplementedError for one that is: it is seen twice, in tiles and as a whole.
        """
        if tiling(processor.image_processor, size).rows:
            raise NotImplementedError(
                f"{cls.__name__}: an image of {size} is seen in tiles and as a whole; its tokens "
                "have no single grid. Set do_image_splitting: false in the image processor"
            )
        return _side(processor), _side(processor)

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
        cut = tiling(processor.image_processor, size)
        side = _side(processor)
        views = [
            (j / cut.columns, i / cut.rows, 1 / cut.columns, 1 / cut.rows)
            for i in range(cut.rows)
            for j in range(cut.columns)
        ]
        x0, x1 = box[0] / size[0], box[2] / size[0]
        y0, y1 = box[1] / size[1], box[3] / size[1]
        cells = torch.arange(side, dtype=torch.float64) / side
        touched = []
        for left, top, width, height in [*views, (0.0, 0.0, 1.0, 1.0)]:
            x, y = left + cells * width, top + cells * height
            across = (x < x1) & (x + width / side > x0)
            down = (y < y1) & (y + height / side > y0)
            touched.append((down[:, None] & across).flatten())
        return torch.cat(touched)


def tiling(image_processor: Any, size: tuple[int, int]) -> Tiling:
    """How the image processor cuts an image of ``size`` (width, height).

    The image processor's own ``get_number_of_image_patches`` rounds otherwise than its cutting
    does, e.g. for 10 x 7 pixels where ``size`` is no multiple of ``max_image_size``.
    """
    width, height = size
    wanted, tile = image_processor.size, int(image_processor.max_image_size["longest_edge"])
    if not image_processor.do_image_splitting:
        return Tiling(0, 0, tile, tile)
    if image_processor.do_resize and "longest_edge" in wanted:
        shaped = np.broadcast_to(np.uint8(0), (3, height, width))
        height, width = get_resize_output_image_size(shaped, int(wanted["longest_edge"]))
    elif image_processor.do_resize:
        height, width = int(wanted["height"]), int(wanted["width"])
    aspect = width / height
    # The longer side first; the other follows from it before it is rounded up itself.
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    if max(width, height) <= tile:
        return Tiling(0, 0, width, height)
    return Tiling(height // tile, width // tile, width, height)


def _tokens(processor: Any) -> int:
    """Image tokens of one tile; the default is the processor class's own."""
    return int(getattr(processor, "image_seq_len", 169))


def _side(processor: Any) -> int:
    """Tokens along a side of one tile."""
    return math.isqrt(_tokens(processor))


METHOD = Idefics3
