"""Keep what a frozen vision tower makes of each image, so that it runs once per image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def projector_of(model: Any) -> Any:
    """The module between tower and language model, under any wrappers."""
    for name, module in model.named_modules():
        if name.endswith("multi_modal_projector"):
            return module
    raise ValueError("the model has no multi_modal_projector: not a LLaVA")


class FeatureCache:
    """Image key -> the projector's input [image tokens, tower width], bfloat16, in memory."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kept: dict[str, torch.Tensor] = {}
        self.tokens = 0
        """Image tokens per image."""

    def __contains__(self, key: str) -> bool:
        return key in self.kept

    def put_features(self, model: Any, inputs: dict[str, Any]) -> None:
        """Replace the batch's pixels and keys by projected features, with gradients to the
        projector. ``model`` is the trained model, maybe wrapped; ``inputs`` is changed."""
        keys = inputs.pop("image_keys")
        if "pixel_values" in inputs:
            self._add(inputs.pop("pixel_keys"), inputs.pop("pixel_values"))
        projector = projector_of(model)
        weight = next(projector.parameters())
        features = torch.stack([self.kept[key] for key in keys]).to(weight.device, weight.dtype)
        projected = projector(features)
        inputs["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=list(projected))}

    @torch.no_grad()
    def _add(self, keys: list[str], pixels: torch.Tensor) -> None:
        """Run the tower; its output is what the projector is called with."""
        caught: list[torch.Tensor] = []
        # looked up now: PEFT may have put its wrapper in the projector's place
        hook = projector_of(self.model).register_forward_pre_hook(
            lambda _, args: caught.append(args[0])
        )
        tower = next(p for n, p in self.model.named_parameters() if "vision_tower" in n)
        try:
            with torch.autocast(tower.device.type, torch.bfloat16, tower.dtype == torch.bfloat16):
                self.model.get_image_features(pixels.to(tower.device, tower.dtype))
        finally:
            hook.remove()
        self.kept.update(zip(keys, caught[0].to(torch.bfloat16).cpu(), strict=True))
