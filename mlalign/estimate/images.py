"""How many tokens the largest image takes, by family and by its image processor's settings.

LLaVA, Gemma 3          the same for every image
LLaVA-NeXT, -OneVision  the whole and the most tiles that the config's canvases allow
Idefics3, SmolVLM       the whole and the tiles of a square of the longest edge
InternVL                the whole and max_patches tiles
Qwen-VL                 the longest_edge of the processor: a number of pixels
"""

from __future__ import annotations

import math
from typing import Any

from mlalign.estimate.projector import Projector
from mlalign.estimate.tower import Tower, square

BY_PROCESSOR = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "internvl")
"""Model types of which the config alone does not say how large an image may be."""
ONEVISION_TILES = 9
"""LLaVA-OneVision shrinks the packed tiles to at most this many tiles' worth of tokens."""


def largest_grid(config: Any, image_processor: Any) -> tuple[int, int]:
    """(rows, columns) of patches of a Qwen-VL image of the most tokens, as square as it may be."""
    merge = square(config.vision_config.spatial_merge_size, "vision_config.spatial_merge_size")
    tokens = _pixels(config, image_processor)
    rows = math.isqrt(tokens)
    return rows * merge, tokens // rows * merge


def _pixels(config: Any, image_processor: Any) -> int:
    """Most tokens of a Qwen-VL image. Raises ValueError where not even one fits."""
    vision = config.vision_config
    merge = square(vision.spatial_merge_size, "vision_config.spatial_merge_size")
    side = merge * square(vision.patch_size, "vision_config.patch_size")
    most = int(image_processor.size["longest_edge"])
    if most < side**2:
        raise ValueError(f"image processor: size.longest_edge {most} is less than {side} x {side}")
    return most // side**2


def most_tiles(
    config: Any, tower: Tower, projector: Projector, image_processor: Any
) -> tuple[int, int]:
    """(tiles, tokens): most images that the tower sees for one of the user's, and most tokens that
    one takes in a prompt, the marks around it and between its tiles included.

    Raises ValueError, naming the setting, where it cannot be told.
    """
    kind, tokens = config.model_type, projector.tokens
    if kind == "gemma3":
        # Begin and end marks, and a blank line on either side.
        return 1, tokens + 4
    if kind in ("idefics3", "smolvlm"):
        return _cut(image_processor, tokens)
    if kind == "internvl":
        most = int(image_processor.max_patches)
        tiles = most + 1 if most > 1 else 1
        return tiles, tiles * tokens + 2
    if kind in ("llava_next", "llava_onevision"):
        return _any_resolution(config, tower, tokens)
    if kind.startswith("qwen"):
        return 1, _pixels(config, image_processor)
    return 1, tokens


def _cut(image_processor: Any, tokens: int) -> tuple[int, int]:
    """Each tile has two marks, each row of tiles a line end, the whole image three marks."""
    size, tile = image_processor.size, int(image_processor.max_image_size["longest_edge"])
    if not image_processor.do_image_splitting:
        return 1, tokens + 3
    if not image_processor.do_resize or "longest_edge" not in size:
        raise ValueError(
            "image processor: an image of any size is cut into tiles; give size: longest_edge and "
            "do_resize: true, or do_image_splitting: false"
        )
    side = math.ceil(int(size["longest_edge"]) / tile)
    if side == 1:
        return 1, tokens + 3
    return side**2 + 1, side**2 * (tokens + 2) + side + tokens + 3


def _any_resolution(config: Any, tower: Tower, tokens: int) -> tuple[int, int]:
    """The whole image, then its tiles packed row by row with a newline after each row."""
    points = config.image_grid_pinpoints
    if not points:
        return 1, tokens
    side, grid = tower.image_size, tower.image_size // tower.patch_size
    counts = [(height // side, width // side) for height, width in points]
    tiles = 1 + max(rows * columns for rows, columns in counts)
    packed = max(rows * grid * (columns * grid + 1) for rows, columns in counts)
    if config.model_type == "llava_onevision":
        # Pooled to at most this area; the newlines of the longest side may stand besides.
        packed = min(packed, ONEVISION_TILES * grid**2 + max(r for r, _ in counts) * grid)
    return tiles, tokens + packed
