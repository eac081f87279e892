"""The shape of a LLaVA-class model, read from its transformers config, and its parameter counts.

Counts are exact: they equal those of the model instantiated on the ``meta`` device. A decoder,
tower or model type that is not known here is refused with the list of those that are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mlalign.estimate.tower import Tower, read_tower
from mlalign.sections import ModelSection

MODELS = ("llava", "llava_next", "llava_onevision")
"""Model types whose parts are known here."""
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Decoder types whose block is known here."""
ONEVISION_TILES = 9
"""LLaVA-OneVision shrinks the packed tiles to at most this many tiles' worth of tokens."""


class GeometryError(ValueError):
    """A config that cannot be estimated. The message names the key and the mend."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only language model of Llama's kind."""

    kind: str
    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    biased: frozenset[str]
    """Linears of a block that have a bias."""
    normed_heads: bool
    """RMS norms over each query and key head (Qwen3)."""
    tied: bool
    """The head is the embedding."""

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together; that of the value heads is the same."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear of one block, by the name of its module."""
        wide, narrow = self.attention_width, self.kv_width
        return {
            "q_proj": (self.width, wide),
            "k_proj": (self.width, narrow),
            "v_proj": (self.width, narrow),
            "o_proj": (wide, self.width),
            "gate_proj": (self.width, self.intermediate),
            "up_proj": (self.width, self.intermediate),
            "down_proj": (self.intermediate, self.width),
        }

    @property
    def block_linear_weights(self) -> int:
        """Weights of one block's linears, biases left out: what quantisation takes."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def block_parameters(self) -> int:
        """Parameters of one block: linears, biases, norms."""
        biases = sum(self.linears[name][1] for name in self.biased)
        norms = 2 * self.width + (2 * self.head_dim if self.normed_heads else 0)
        return self.block_linear_weights + biases + norms

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding."""
        return self.vocabulary * self.width

    @property
    def head_parameters(self) -> int:
        """Parameters of the head; 0 where it is tied to the embedding."""
        return 0 if self.tied else self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All parameters, head included."""
        blocks = self.layers * self.block_parameters
        return self.embedding_parameters + blocks + self.width + self.head_parameters


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A vision-language model: decoder, tower, projector."""

    model_type: str
    decoder: Decoder
    tower: Tower
    features: int
    """Width of what the projector reads: the tower's, times the layers that are concatenated."""
    projector_biased: bool
    newline: bool
    """A trained embedding ends each row of image tokens (LLaVA-NeXT, LLaVA-OneVision)."""
    tile_tokens: int
    """Rows that the projector makes of one image that the tower sees."""
    tiles: int
    """Most images that the tower sees for one image of the user (any-resolution tiles)."""
    image_tokens: int
    """Most tokens that one image of the user takes in the prefix."""

    @property
    def projector_parameters(self) -> int:
        """Parameters of the two linears, and of the newline embedding."""
        width = self.decoder.width
        biases = 2 * width if self.projector_biased else 0
        return (self.features + width) * width + biases + (width if self.newline else 0)

    @property
    def parameters(self) -> int:
        """All parameters; a tied head is counted once."""
        return self.decoder.parameters + self.tower.parameters + self.projector_parameters


def config_of(section: ModelSection) -> Any:
    """The transformers config of a recipe's model: folder, Hub id or ``builtin:NAME``.

    Raises GeometryError where there is none.
    """
    path = section.path
    if path.startswith("builtin:"):
        path = str(Path(__file__).parents[1] / path.removeprefix("builtin:") / "base")
    try:
        return AutoConfig.from_pretrained(
            str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path,
            revision=section.revision,
        )
    except (OSError, ValueError) as error:
        raise GeometryError(f"model.path: no config at {section.path}: {error}") from error


def read(config: Any) -> Geometry:
    """The geometry of a transformers config. Raises GeometryError for what is not known here."""
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in MODELS:
        raise GeometryError(
            f"model_type {kind!r} cannot be estimated; there are: {', '.join(MODELS)}. Write "
            "train.gradient_checkpointing: true or false instead of auto"
        )
    tied = bool(config.tie_word_embeddings)
    decoder = read_decoder(config.text_config, tied=tied)
    try:
        tower = read_tower(config.vision_config)
    except ValueError as error:
        raise GeometryError(str(error)) from error
    chosen = config.vision_feature_layer
    whole = config.vision_feature_select_strategy == "full"
    tokens = tower.positions if whole else tower.patches
    tiles, image_tokens = _tiles(config, tower, tokens)
    return Geometry(
        model_type=kind,
        decoder=decoder,
        tower=tower,
        features=tower.width * (1 if isinstance(chosen, int) else len(chosen)),
        projector_biased=bool(config.multimodal_projector_bias),
        newline=kind != "llava",
        tile_tokens=tokens,
        tiles=tiles,
        image_tokens=image_tokens,
    )


def read_decoder(config: Any, *, tied: bool) -> Decoder:
    """The decoder of a text config. Raises GeometryError for an unknown kind or sliding windows."""
    kind = config.model_type
    if kind not in DECODERS:
        raise GeometryError(
            f"text_config.model_type {kind!r} cannot be estimated; there are: {', '.join(DECODERS)}"
        )
    windowed = getattr(config, "sliding_window", None) is not None
    if windowed and getattr(config, "use_sliding_window", True):
        raise GeometryError(
            "text_config.sliding_window: attention over windows cannot be estimated"
        )
    biased: set[str] = set()
    if kind == "qwen2":
        biased |= {"q_proj", "k_proj", "v_proj"}
    elif getattr(config, "attention_bias", False):
        biased |= {"q_proj", "k_proj", "v_proj", "o_proj"}
    if getattr(config, "mlp_bias", False):
        biased |= {"gate_proj", "up_proj", "down_proj"}
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Decoder(
        kind=kind,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        biased=frozenset(biased),
        normed_heads=kind == "qwen3",
        tied=tied,
    )


def _tiles(config: Any, tower: Tower, tokens: int) -> tuple[int, int]:
    """Most tiles, and most tokens, of one image. Any resolution: the whole image, then its tiles
    packed row by row with a newline after each row."""
    points = getattr(config, "image_grid_pinpoints", None)
    if config.model_type == "llava" or not points:
        return 1, tokens
    side, grid = tower.image_size, tower.image_size // tower.patch_size
    counts = [(height // side, width // side) for height, width in points]
    tiles = 1 + max(rows * columns for rows, columns in counts)
    packed = max(rows * grid * (columns * grid + 1) for rows, columns in counts)
    if config.model_type == "llava_onevision":
        # Pooled to at most this area; the newlines of the longest side may stand besides.
        packed = min(packed, ONEVISION_TILES * grid**2 + max(r for r, _ in counts) * grid)
    return tiles, tokens + packed
