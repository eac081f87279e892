"""A vision tower's parameters and FLOPs: CLIP and SigLIP in closed form, any other by counting.

Another tower is instantiated on the ``meta`` device (shapes without storage), its parameters are
counted and one image is passed through it under torch's own FLOP counter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Tower:
    """What a vision tower costs."""

    kind: str
    layers: int
    width: int
    patches: int
    """Patches of one image."""
    positions: int
    """Patches and, where there is one, the class token: the rows that the layers see."""
    image_size: int
    patch_size: int
    parameters: int
    flops: int
    """Of one image forward through every layer, as transformers runs it."""
    layer_flops: int
    """Of one layer; 0 for a tower that was counted and not derived."""


def read_tower(config: Any) -> Tower:
    """The tower of a vision config. Raises ValueError for one that neither rule can serve."""
    if config.model_type in ("clip_vision_model", "siglip_vision_model"):
        return _closed_form(config)
    return _counted(config)


def _closed_form(config: Any) -> Tower:
    """ViT: patches, positions, pre-norm blocks with biased linears, a last norm. CLIP adds a class
    token and a first norm; SigLIP a bias to the patches and a pooling head (run, and not used)."""
    siglip = config.model_type == "siglip_vision_model"
    width, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    patches = (config.image_size // config.patch_size) ** 2
    positions = patches if siglip else patches + 1
    pixels = config.num_channels * config.patch_size**2
    attention, mlp, norm = 4 * width * (width + 1), 2 * width * wide + wide + width, 2 * width
    parameters = pixels * width + positions * width + layers * (attention + mlp + 2 * norm) + norm
    layer = 2 * positions * (4 * width**2 + 2 * width * wide) + 4 * positions**2 * width
    flops = 2 * patches * pixels * width + layers * layer
    if not siglip:
        parameters += width + norm
    else:
        parameters += width
        if getattr(config, "vision_use_head", True):
            parameters += width + attention + norm + mlp
            # One query: projected, attended, put out; keys and values of every patch.
            flops += 2 * (2 * width**2 + 2 * width * wide) + 4 * positions * width
            flops += 2 * positions * 2 * width**2
    return Tower(
        kind=config.model_type,
        layers=layers,
        width=width,
        patches=patches,
        positions=positions,
        image_size=config.image_size,
        patch_size=config.patch_size,
        parameters=parameters,
        flops=flops,
        layer_flops=layer,
    )


def _counted(config: Any) -> Tower:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    try:
        side, patch = int(config.image_size), int(config.patch_size)
        with torch.device("meta"), torch.no_grad():
            model = AutoModel.from_config(config).eval()
            pixels = torch.empty(1, config.num_channels, side, side)
            with FlopCounterMode(display=False) as counter:
                model(pixels)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"vision_config.model_type {config.model_type!r} cannot be estimated: it is neither "
            f"CLIP nor SigLIP, and a pass of one square image on the meta device failed: {error}"
        ) from error
    return Tower(
        kind=config.model_type,
        layers=int(getattr(config, "num_hidden_layers", 1)),
        width=config.hidden_size,
        patches=(side // patch) ** 2,
        positions=(side // patch) ** 2,
        image_size=side,
        patch_size=patch,
        parameters=sum(each.numel() for each in model.parameters()),
        flops=counter.get_total_flops(),
        layer_flops=0,
    )
