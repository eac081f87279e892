"""What stands between a vision tower and a language model, by family: weights, FLOPs, what a
backward pass through it keeps.

N tokens of a tile, C the tower's width, D the language model's, s patches along a side of a token:

    LLaVA, -NeXT, -OneVision   C -> D, gelu, D -> D               (and a newline of D)
    InternVL                   norm over s^2 C -> D, gelu, D -> D
    Idefics3, SmolVLM          s^2 C -> D
    Gemma 3                    mean over s^2 patches, norm over C -> D
    Qwen2-VL, Qwen2.5-VL       norm over C, s^2 C -> s^2 C, gelu, s^2 C -> D
    Qwen3-VL                   the same, and once more for each deepstack level, norm over s^2 C
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from mlalign.estimate.tower import Tower, square


class Matrix(NamedTuple):
    """One matrix product over a tile."""

    rows: int
    inputs: int
    outputs: int
    reached: bool
    """Whether its input has a gradient where the projector trains: not the first one's, unless a
    norm that trains stands before it."""


@dataclass(frozen=True, kw_only=True)
class Projector:
    """What it costs, over one tile."""

    modules: tuple[str, ...]
    """Names of its modules in the model."""
    parameters: int
    """Of the modules, and of a newline embedding."""
    matrices: tuple[Matrix, ...]
    tokens: int
    """Rows that come out for the language model."""
    levels: int = 1
    """How often each of them does: Qwen3-VL's deepstack hands features to several blocks."""
    kept: int
    """Elements of the activations' dtype that a backward pass through it keeps."""
    kept_floats: int = 0
    """Float32 elements besides: inside norms."""

    @property
    def flops(self) -> float:
        """Of one pass."""
        return sum(2.0 * m.rows * m.inputs * m.outputs for m in self.matrices)

    @property
    def backward_flops(self) -> float:
        """Of the backward where it trains; the tower is frozen."""
        return sum(2.0 * m.rows * m.inputs * m.outputs * (1 + m.reached) for m in self.matrices)


def read_projector(config: Any, tower: Tower) -> Projector:
    """The projector of a model's config, of a model type that ``geometry`` knows."""
    kind, width = config.model_type, config.text_config.hidden_size
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        return _merger(config, tower)
    if kind in ("idefics3", "smolvlm"):
        return _shuffle(config, tower, width)
    if kind == "gemma3":
        return _pool(config, tower, width)
    return _two_layers(config, tower, width)


def _two_layers(config: Any, tower: Tower, width: int) -> Projector:
    """LLaVA's and InternVL's."""
    chosen, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    tokens = tower.positions if strategy == "full" else tower.patches
    shuffled = config.model_type == "internvl"
    if shuffled:
        joined = int(1 / config.downsample_ratio) ** 2
        tokens, features = tokens // joined, tower.width * joined
        # The shuffled features, and the norm's output that the first linear reads.
        kept, floats = 2 * tokens * features, 2 * tokens
        biased, own = True, 2 * features
    else:
        features = tower.width * (1 if isinstance(chosen, int) else len(chosen))
        # With the class token: what is selected is a part of the tower's own output.
        kept, floats = tower.positions * features, 0
        biased = bool(config.multimodal_projector_bias)
        own = 0 if config.model_type == "llava" else width
    return Projector(
        modules=("model.multi_modal_projector",),
        parameters=(features + width) * width + (2 * width if biased else 0) + own,
        matrices=(
            Matrix(tokens, features, width, reached=shuffled),
            Matrix(tokens, width, width, reached=True),
        ),
        tokens=tokens,
        # Before and after the gelu.
        kept=kept + 2 * tokens * width,
        kept_floats=floats,
    )


def _shuffle(config: Any, tower: Tower, width: int) -> Projector:
    """Idefics3's connector."""
    joined = config.scale_factor**2
    tokens, features = tower.patches // joined, tower.width * joined
    return Projector(
        modules=("model.connector",),
        parameters=features * width,
        matrices=(Matrix(tokens, features, width, reached=False),),
        tokens=tokens,
        kept=tokens * features,
    )


def _pool(config: Any, tower: Tower, width: int) -> Projector:
    """Gemma 3's."""
    tokens, features = config.mm_tokens_per_image, tower.width
    return Projector(
        modules=("model.multi_modal_projector",),
        parameters=features * width + features,
        matrices=(Matrix(tokens, features, width, reached=True),),
        tokens=tokens,
        # The norm's output, and the same before its gain; below that nothing has a gradient.
        kept=tokens * features,
        kept_floats=tokens * features,
    )


def _merger(config: Any, tower: Tower) -> Projector:
    """Qwen-VL's mergers."""
    vision, kind = config.vision_config, config.model_type
    joined = square(vision.spatial_merge_size, "vision_config.spatial_merge_size") ** 2
    tokens, wide = tower.patches // joined, tower.width * joined
    out = vision.hidden_size if kind == "qwen2_vl" else vision.out_hidden_size
    linears = wide * wide + wide + wide * out + out
    matrices = (Matrix(tokens, wide, wide, reached=True), Matrix(tokens, wide, out, reached=True))
    norm = tower.width if kind == "qwen2_5_vl" else 2 * tower.width
    # LayerNorm keeps mean and 1 / std; the RMS norm of a frozen input only what its gain scales.
    floats = 0 if kind == "qwen2_5_vl" else 2 * tokens * joined
    deep = len(vision.deepstack_visual_indexes) if kind == "qwen3_vl" else 0
    return Projector(
        modules=(
            "model.visual.merger",
            *(f"model.visual.deepstack_merger_list.{level}" for level in range(deep)),
        ),
        parameters=norm + linears + deep * (2 * wide + linears),
        matrices=matrices * (1 + deep),
        tokens=tokens,
        levels=1 + deep,
        # The norm's input (or what its gain scales), its output, and both sides of the gelu.
        kept=4 * tokens * wide * (1 + deep),
        kept_floats=floats + 2 * tokens * deep,
    )
