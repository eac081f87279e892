"""Any-resolution tiles: what LLaVA-NeXT and LLaVA-OneVision have in common.

The image is seen twice. First whole, squeezed into one tile of side x side tokens. Then in its own
shape: resized into the best of the allowed canvases, centred there, cut into tiles; the tiles'
tokens are put together again, whole rows or columns of padding are taken off, and a newline token
ends every row:

    tokens = side^2 + rows * (columns + 1)

All of it stands under one placeholder id, the newlines too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from mlalign.models._family import Family, ImageInputs

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""


@dataclass(frozen=True)
class Tiles:
    """Where the tokens of an image's tiles lie on its canvas."""

    tile: int
    """Pixels along a tile's side."""
    side: int
    """Tokens along a tile's side."""
    canvas: tuple[int, int]
    """(height, width) of the canvas in pixels, a multiple of ``tile``."""
    skipped: tuple[int, int]
    """Rows and columns of tokens taken off at each end, as padding."""
    shape: tuple[int, int]
    """Rows and columns of tokens left."""

    def touched(self, box: Box, size: tuple[int, int]) -> Tensor:
        """Bool (rows, columns): tokens that ``box`` touches, in an image of ``size`` (w, h)."""
        width, height = size
        canvas_height, canvas_width = self.canvas
        if canvas_width / width < canvas_height / height:
            scale = canvas_width / width
            inside = canvas_width, min(math.ceil(height * scale), canvas_height)
        else:
            scale = canvas_height / height
            inside = min(math.ceil(width * scale), canvas_width), canvas_height
        left, top = (canvas_width - inside[0]) // 2, (canvas_height - inside[1]) // 2
        across = self._along(1, *(left + x * inside[0] / width for x in box[::2]))
        down = self._along(0, *(top + y * inside[1] / height for y in box[1::2]))
        return down[:, None] & across

    def _along(self, axis: int, start: float, stop: float) -> Tensor:
        """Bool: which of the tokens left along an axis touch [start, stop) of the canvas."""
        tiles, first, count = self.canvas[axis] // self.tile, self.skipped[axis], self.shape[axis]
        starts = _starts(self.tile, self.side, tiles)[first : first + count]
        return (starts < stop) & (starts + self.tile // self.side > start)


def tiles_of(
    size: tuple[int, int], pinpoints: Sequence[Sequence[int]], tile: int, side: int
) -> Tiles:
    """The tiles of an image of ``size`` (w, h); ``pinpoints``: allowed canvases (height, width)."""
    width, height = size
    canvas = select_best_resolution((height, width), list(pinpoints))
    rows, columns = (side * (length // tile) for length in canvas)
    skip_rows = skip_columns = 0
    # Rounded as the models do it: rows and columns that are padding in part only stay.
    if width / height > columns / rows:
        skip_rows = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        skip_columns = (columns - int(round(width * (rows / height), 7))) // 2
    shape = rows - 2 * skip_rows, columns - 2 * skip_columns
    return Tiles(tile, side, (canvas[0], canvas[1]), (skip_rows, skip_columns), shape)


class AnyRes(Family):
    """Base of the two families; each says how many tokens a tile has and how rows are thinned."""

    bare = ("image_newline",)

    @classmethod
    def keys(cls, made: Any) -> list[str]:
        """Pixels of the tiles, and the image's own (height, width)."""
        return ["pixel_values", "image_sizes"]

    @classmethod
    def collate(cls, images: Sequence[ImageInputs]) -> dict[str, Tensor]:
        """Tiles of all images one after the other: no tile is only there to pad."""
        return {
            "pixel_values": torch.cat([image.tensors["pixel_values"][0] for image in images]),
            "image_sizes": torch.cat([image.tensors["image_sizes"] for image in images]),
        }

    @classmethod
    def image_text(cls, processor: Any, size: tuple[int, int]) -> str:
        """One placeholder for every token of the whole, the tiles and the newlines."""
        rows, columns = cls.kept(processor, cls.tiles(processor, size))
        return cls.placeholder(processor) * (cls.whole(processor) + rows * (columns + 1))

    @classmethod
    def patch_mask(cls, processor: Any, box: Box, size: tuple[int, int], mode: str) -> Tensor:
        """Bool (P,): tokens that ``box`` touches, in the whole and again in the tiles.

        ``box``: x0, y0, x1, y1 in pixels of the original image of ``size`` (width, height).
        Newlines are False. Raises NotImplementedError where tiles are cropped after resizing.
        """
        tiles = cls.tiles(processor, size)
        if _resized(processor) != tiles.tile or cls.whole(processor) != tiles.side**2:
            raise NotImplementedError(
                f"{cls.__name__}: boxes are mapped only where the image processor's size and "
                "crop_size agree and a tile has a square of tokens; leave box probes out"
            )
        tile, side = tiles.tile, tiles.side
        width, height = size[0] / tile, size[1] / tile
        squeezed = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
        alone = Tiles(tile, side, (tile, tile), (0, 0), (side, side))
        whole = alone.touched(squeezed, (tile, tile))
        seen = cls.thinned(processor, tiles, tiles.touched(box, size))
        seen = torch.nn.functional.pad(seen, (0, 1))
        return torch.cat([whole.flatten(), seen.flatten()])

    @classmethod
    def tiles(cls, processor: Any, size: tuple[int, int]) -> Tiles:
        """The tiles of an image of ``size`` (w, h)."""
        pinpoints = processor.image_processor.image_grid_pinpoints
        return tiles_of(size, pinpoints, tile_size(processor), cls.side(processor))

    @classmethod
    def side(cls, processor: Any) -> int:
        """Tokens along a tile's side."""
        raise NotImplementedError

    @classmethod
    def whole(cls, processor: Any) -> int:
        """Tokens of the image as a whole."""
        raise NotImplementedError

    @classmethod
    def kept(cls, processor: Any, tiles: Tiles) -> tuple[int, int]:
        """Rows and columns of the tiles' tokens that reach the language model."""
        return tiles.shape

    @classmethod
    def thinned(cls, processor: Any, tiles: Tiles, touched: Tensor) -> Tensor:
        """Bool (rows, columns) of ``kept``, from those of the tiles."""
        return touched


def tile_size(processor: Any) -> int:
    """Pixels along the side of a tile, as the tower sees it."""
    image_processor = processor.image_processor
    if getattr(image_processor, "do_center_crop", False) and image_processor.crop_size:
        return int(image_processor.crop_size["height"])
    return _resized(processor)


def _resized(processor: Any) -> int:
    """Pixels along the side of a tile before it is cropped."""
    size = processor.image_processor.size
    return int(size["height"] if "height" in size else size["shortest_edge"])


def _starts(tile: int, side: int, tiles: int) -> Tensor:
    """int64: first pixel of each token along a row of tiles. A tile's last pixels may belong to
    no token: 27 patches of 14 pixels leave 6 of 384."""
    each = torch.arange(side) * (tile // side)
    return (torch.arange(tiles)[:, None] * tile + each).flatten()
