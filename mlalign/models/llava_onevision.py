"""LLaVA-OneVision: LLaVA-NeXT's tiles, thinned where an image has too many of them.

The tiles' tokens are shrunk (bilinear) where there are more than 1.21 times ``max`` tiles' worth,
``max`` being the number in ``vision_aspect_ratio: anyres_max_9``:

    ratio = sqrt(rows * columns / (max * side^2));   if ratio > 1.1:  rows, columns -> // ratio
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from mlalign.models._anyres import AnyRes, Tiles

THINNED_FROM = 1.1
"""Ratio above which the models shrink."""


class LlavaOnevision(AnyRes):
    """What is particular to the family. Images only; videos have another placeholder."""

    architectures = ("LlavaOnevisionForConditionalGeneration",)

    @classmethod
    def placeholder(cls, processor: Any) -> str:
        """The processor's own, or its class's default."""
        return getattr(processor, "image_token", "<image>")

    @classmethod
    def side(cls, processor: Any) -> int:
        """Tokens along a tile's side."""
        return math.isqrt(int(processor.num_image_tokens))

    @classmethod
    def whole(cls, processor: Any) -> int:
        """Tokens of a tile; SigLIP has no CLS to be dropped."""
        dropped = getattr(processor, "vision_feature_select_strategy", None) == "default"
        return int(processor.num_image_tokens) - dropped

    @classmethod
    def kept(cls, processor: Any, tiles: Tiles) -> tuple[int, int]:
        """Rows and columns after shrinking."""
        rows, columns = tiles.shape
        ratio = math.sqrt(rows * columns / (_max_tiles(processor) * tiles.side**2))
        if ratio <= THINNED_FROM:
            return rows, columns
        return int(rows // ratio), int(columns // ratio)

    @classmethod
    def thinned(cls, processor: Any, tiles: Tiles, touched: Tensor) -> Tensor:
        """A shrunk token is touched where any of the tokens that it is made of is."""
        shape = cls.kept(processor, tiles)
        if shape == tiles.shape:
            return touched
        share = nn.functional.interpolate(touched[None, None].double(), shape, mode="bilinear")
        return share[0, 0] > 0


def _max_tiles(processor: Any) -> int:
    """The number in ``vision_aspect_ratio``. Raises ValueError for another kind."""
    kind = str(getattr(processor, "vision_aspect_ratio", "anyres_max_9"))
    number = kind.removeprefix("anyres_max_")
    if not number.isdigit():
        raise ValueError(
            f"processor_config.json: vision_aspect_ratio: {kind!r} is not served; "
            "LLaVA-OneVision's is anyres_max_N"
        )
    return int(number)


METHOD = LlavaOnevision
