"""A vision tower's parameters and FLOPs: in closed form where it is known, else by counting.

Known: CLIP, SigLIP (Idefics3's and SmolVLM's are SigLIPs without its head), InternVL's, and those
of the Qwen-VL families, whose cost depends on the image's size. Another tower is instantiated on
the ``meta`` device (shapes without storage), its parameters are counted and one image is passed
through it under torch's own FLOP counter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

QWEN = ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision")
"""Towers that take an image at its own size."""
SIGLIPS = ("siglip_vision_model", "idefics3_vision", "smolvlm_vision")


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
    """Pixels along a side; 0 for a tower that takes an image at its own size."""
    patch_size: int
    parameters: int
    flops: int
    """Of one image forward through every layer, as transformers runs it."""
    layer_flops: int
    """Of one layer; 0 for a tower that was counted, and for one of unequal layers."""


def read_tower(config: Any, grid: tuple[int, int] | None = None) -> Tower:
    """The tower of a vision config. ``grid``: (rows, columns) of patches of the image, for a tower
    that takes any. Raises ValueError for one that no rule can serve."""
    if config.model_type in QWEN:
        if grid is None:
            raise ValueError(f"vision_config.model_type {config.model_type!r} needs an image size")
        return _any_size(config, grid)
    if config.model_type == "internvl_vision":
        return _internvl(config)
    if config.model_type == "clip_vision_model" or config.model_type in SIGLIPS:
        return _closed_form(config)
    return _counted(config)


def square(value: Any, key: str) -> int:
    """One number of a size that may be given as two. Raises ValueError where they differ."""
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{key}: {list(value)} cannot be estimated; only squares")
    return int(value[0])


def _closed_form(config: Any) -> Tower:
    """ViT: patches, positions, pre-norm blocks with biased linears, a last norm. CLIP adds a class
    token and a first norm; SigLIP a bias to the patches and a pooling head (run, and not used)."""
    siglip = config.model_type in SIGLIPS
    side = square(config.image_size, "vision_config.image_size")
    patch = square(config.patch_size, "vision_config.patch_size")
    width, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    patches = (side // patch) ** 2
    positions = patches if siglip else patches + 1
    pixels = config.num_channels * patch**2
    attention, mlp, norm = 4 * width * (width + 1), 2 * width * wide + wide + width, 2 * width
    parameters = pixels * width + positions * width + layers * (attention + mlp + 2 * norm) + norm
    layer = _layer(positions, width, 2 * width * wide, positions**2)
    flops = 2 * patches * pixels * width + layers * layer
    if not siglip:
        parameters += width + norm
    else:
        parameters += width
        if config.model_type == "siglip_vision_model" and getattr(config, "vision_use_head", True):
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
        image_size=side,
        patch_size=patch,
        parameters=parameters,
        flops=flops,
        layer_flops=layer,
    )


def _internvl(config: Any) -> Tower:
    """ViT with a class token, two scales per block, and biases and norms that the config names."""
    side = square(config.image_size, "vision_config.image_size")
    patch = square(config.patch_size, "vision_config.patch_size")
    width, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    patches = (side // patch) ** 2
    pixels = config.num_channels * patch**2
    norm = 2 * width if config.norm_type == "layer_norm" else width
    block = 4 * width**2 + width + 2 * width * wide + wide + width + 2 * norm + 2 * width
    block += (3 * width if config.attention_bias else 0) + (2 * width if config.use_qk_norm else 0)
    parameters = pixels * width + width + width + layers * block
    parameters += width if config.use_mask_token else 0
    parameters += (patches + 1) * width if config.use_absolute_position_embeddings else 0
    parameters += 0 if config.use_mean_pooling else 2 * width
    layer = _layer(patches + 1, width, 2 * width * wide, (patches + 1) ** 2)
    return Tower(
        kind=config.model_type,
        layers=layers,
        width=width,
        patches=patches,
        positions=patches + 1,
        image_size=side,
        patch_size=patch,
        parameters=parameters,
        flops=2 * patches * pixels * width + layers * layer,
        layer_flops=layer,
    )


def _any_size(config: Any, grid: tuple[int, int]) -> Tower:
    """Qwen-VL's: patches of two frames, rotary positions (Qwen3's learned ones besides), no last
    norm. Qwen2.5's has RMS norms, a gated MLP, and attends in windows but for some blocks."""
    kind = config.model_type
    width = config.embed_dim if kind == QWEN[0] else config.hidden_size
    wide = int(width * config.mlp_ratio) if kind == QWEN[0] else config.intermediate_size
    patch = square(config.patch_size, "vision_config.patch_size")
    frames = square(config.temporal_patch_size, "vision_config.temporal_patch_size")
    patches = grid[0] * grid[1]
    pixels = config.in_channels * frames * patch**2
    gated = kind == QWEN[1]
    weights = (3 if gated else 2) * width * wide
    biases = 3 * width + width + (2 if gated else 1) * wide + width
    norms = 2 * width if gated else 4 * width
    parameters = pixels * width + config.depth * (4 * width**2 + weights + biases + norms)
    if kind == QWEN[2]:
        parameters += width + config.num_position_embeddings * width
    whole = _layer(patches, width, weights, patches**2)
    flops = 2 * patches * pixels * width + config.depth * whole
    if gated:
        inside = config.depth - len(set(config.fullatt_block_indexes) & set(range(config.depth)))
        flops -= inside * 4 * width * (patches**2 - _windowed(config, grid, patch))
    return Tower(
        kind=kind,
        layers=config.depth,
        width=width,
        patches=patches,
        positions=patches,
        image_size=0,
        patch_size=patch,
        parameters=parameters,
        flops=flops,
        layer_flops=0 if gated else whole,
    )


def _layer(positions: int, width: int, mlp: int, pairs: int) -> int:
    """FLOPs of one block: projections, MLP of ``mlp`` weights, ``pairs`` attended pairs."""
    return 2 * positions * (4 * width**2 + mlp) + 4 * pairs * width


def _windowed(config: Any, grid: tuple[int, int], patch: int) -> int:
    """Attended pairs of patches within the windows of an image; those at its edges are smaller."""
    side = config.window_size // config.spatial_merge_size // patch * config.spatial_merge_size
    rows, columns = (
        [side] * (length // side) + [length % side] * (length % side > 0) for length in grid
    )
    return sum((height * width) ** 2 for height in rows for width in columns)


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
            f"vision_config.model_type {config.model_type!r} cannot be estimated: no closed form "
            f"is known here, and a pass of one square image on the meta device failed: {error}"
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
