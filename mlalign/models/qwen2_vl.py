"""Qwen2-VL: images at their own resolution, 2 x 2 patches to a token, three rows of positions.

Serves ``Qwen2VLForConditionalGeneration``. M-RoPE (arXiv 2409.12191, section 2.1): text tokens
count alike in the temporal, height and width rows of positions; an image takes one temporal
position and its own row and column numbers, and text goes on after the largest of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mlalign.branching.layout import LayoutError
from mlalign.models._family import Family, ImageInputs


class Qwen2VL(Family):
    """What is particular to the family."""

    architectures = ("Qwen2VLForConditionalGeneration",)
    towers = ("visual",)

    @classmethod
    def frozen_towers(cls, core: Any) -> list[nn.Module]:
        """The tower without its merger, then the merger: the model holds both as ``visual``."""
        visual = core.model.visual
        return [nn.ModuleList([visual.patch_embed, *visual.blocks]), visual.merger]

    @classmethod
    def keys(cls, made: Any) -> list[str]:
        """Patches of all images in one row, and how many of them each image has."""
        return ["pixel_values", "image_grid_thw"]

    @classmethod
    def placeholder(cls, processor: Any) -> str:
        """What the chat template writes where the image goes."""
        # The processor's own default; published checkpoints do not write it down.
        return getattr(processor, "image_token", "<|image_pad|>")

    @classmethod
    def image_text(cls, processor: Any, size: tuple[int, int]) -> str:
        """One placeholder for every square of merged patches."""
        rows, columns = cls.grid(processor, size)
        return cls.placeholder(processor) * (rows * columns)

    @classmethod
    def positions(cls, core: Any, prefix: Sequence[int], image: ImageInputs) -> Tensor | None:
        """int64 (3, tokens): temporal, height and width positions, by the model's own rule.

        Raises LayoutError where the prefix does not hold the image's tokens once, in one run.
        """
        ids = torch.tensor([list(prefix)])
        kinds = _kinds(ids, cls.image_token_id(core))
        grid = image.tensors["image_grid_thw"]
        wanted = int(grid.prod()) // core.config.vision_config.spatial_merge_size**2
        places = kinds[0].nonzero()[:, 0].tolist()
        if len(places) != wanted:
            raise LayoutError(
                f"{len(places)} image tokens in the prompt, but {wanted} features of its image. "
                "The prompt needs the image once, and processor and model must be of one kind "
                "(patch and merge size)"
            )
        if places[-1] - places[0] != wanted - 1:
            raise LayoutError(
                "the image's tokens do not stand in one run: the prompt needs it once"
            )
        found, _ = core.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
        return found[:, 0]

    @classmethod
    def generation(
        cls, ids_RT: Tensor, image_token_id: int, images: Sequence[ImageInputs]
    ) -> dict[str, Tensor]:
        """What ``generate`` computes the three rows of positions from."""
        grids = torch.cat([image.tensors["image_grid_thw"] for image in images])
        kinds = _kinds(ids_RT, image_token_id)
        return {"mm_token_type_ids": kinds, "image_grid_thw": grids.to(ids_RT.device)}

    @classmethod
    def grid(cls, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the image tokens of an image of ``size`` (w, h).

        Raises ValueError for an image more than 200 times as long as it is wide, or as wide.
        """
        height, width = _seen_size(processor.image_processor, size)
        side = _side(processor.image_processor)
        return height // side, width // side

    @classmethod
    def patch_mask(
        cls,
        processor: Any,
        box: tuple[float, float, float, float],
        size: tuple[int, int],
        mode: str,
    ) -> Tensor:
        """Bool (P,): the image tokens that ``box`` touches, after the processor's own resize.

        ``box``: x0, y0, x1, y1 in pixels of the original image of ``size`` (width, height). All
        False for a box without area.
        """
        x0, y0, x1, y1 = box
        height, width = _seen_size(processor.image_processor, size)
        side = _side(processor.image_processor)
        # Edges of the tokens in pixels of the original: the two directions scale unequally.
        left, right = _edges(width // side, side * size[0] / width)
        top, bottom = _edges(height // side, side * size[1] / height)
        across = (left < x1) & (right > x0) & (x0 < x1)
        down = (top < y1) & (bottom > y0) & (y0 < y1)
        return (down[:, None] & across[None, :]).flatten()


def _kinds(ids_RT: Tensor, image_token_id: int) -> Tensor:
    """int64 (R, T): 1 at image tokens, 0 at text, as the model's position rule takes it."""
    return (ids_RT == image_token_id).long()


def _side(image_processor: Any) -> int:
    """Pixels (of what the tower sees) along one side of an image token."""
    return int(image_processor.patch_size * image_processor.merge_size)


def _seen_size(image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of what the tower sees of an image of ``size`` (w, h)."""
    width, height = size
    if not image_processor.do_resize:
        return height, width
    bounds = image_processor.size
    return smart_resize(
        height,
        width,
        factor=_side(image_processor),
        min_pixels=bounds["shortest_edge"],
        max_pixels=bounds["longest_edge"],
    )


def _edges(count: int, step: float) -> tuple[Tensor, Tensor]:
    """Where each of ``count`` cells starts and ends."""
    start = torch.arange(count, dtype=torch.float64) * step
    return start, start + step


METHOD = Qwen2VL
