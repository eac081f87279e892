"""Keep what a frozen vision tower makes of each image, so that it runs once per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mlalign.branching.batch import PrefixBatch
from mlalign.models import _vision
from mlalign.models._vlm import VLM

NEAR = 0.05
"""Relative distance within which two dtypes' features are the same; another order is at 1."""


class FeatureCache:
    """Image key -> the projector's input (tiles, tokens, width), bfloat16, in memory.

    Serves families of one projector whose output is the image's tokens as they are: LLaVA,
    Idefics3, SmolVLM, InternVL, Gemma 3. Raises ValueError, naming the family, for another.
    """

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        self.kept: dict[str, Tensor] = {}
        names = vlm.family.projectors(vlm.core)
        self.projector = names[0]
        if len(names) != 1:
            raise self._refusal()

    def encode(self, model: Any, batch: PrefixBatch, keys: Sequence[str]) -> PrefixBatch:
        """The batch with features, with gradients to the projector.

        ``model``: the trained one, maybe wrapped; ``keys``: of the batch's different images.
        """
        if any(key not in self.kept for key in keys):
            self._add(batch, keys)
        projector = self.vlm.core.get_submodule(self.projector)
        weight = next(projector.parameters())
        kept = [self.kept[key].to(weight.device, weight.dtype) for key in keys]
        made = projector(torch.cat(kept)).split([len(tiles) for tiles in kept])
        found = BaseModelOutputWithPooling(pooler_output=[each.flatten(0, 1) for each in made])  # type: ignore[arg-type]
        features = self.vlm.family.arrange(found, batch.image_G)
        return replace(batch, features=features, images={})

    @torch.no_grad()
    def _add(self, batch: PrefixBatch, keys: Sequence[str]) -> None:
        """Run the tower; its output is what the projector is called with."""
        core, caught = self.vlm.core, []
        # Looked up now: PEFT may have put its wrapper in the projector's place.
        projector = core.get_submodule(self.projector)
        hook = projector.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:
            found = _vision.features(core, self.vlm.family, batch.images).pooler_output
        finally:
            hook.remove()
        lengths = [len(each) for each in found]
        tiles = caught[0]
        if len(caught) != 1 or tiles.ndim != 3 or sum(lengths) % len(tiles):
            raise self._refusal()
        tokens = sum(lengths) // len(tiles)
        again = projector(tiles.to(next(projector.parameters()).dtype)).flatten(0, 1)
        whole = torch.cat(list(found)).to(again.dtype)
        if again.shape != whole.shape or (again - whole).norm() > NEAR * whole.norm():
            raise self._refusal()
        parts = tiles.to(torch.bfloat16).cpu().split([length // tokens for length in lengths])
        self.kept.update(zip(keys, parts, strict=True))

    def _refusal(self) -> ValueError:
        return ValueError(
            f"sft.cache_features: {self.vlm.family.__name__} has several projectors, or puts an "
            "image's tokens together after its projector. Set it to false"
        )
