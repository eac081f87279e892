"""The shape of a vision-language model, read from its transformers config, and parameter counts.

Counts are exact: they equal those of the model instantiated on the ``meta`` device. A decoder,
tower or model type that is not known here is refused with the list of those that are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor

from mlalign.estimate.images import BY_PROCESSOR, largest_grid, most_tiles
from mlalign.estimate.projector import Projector, read_projector
from mlalign.estimate.tower import Tower, read_tower
from mlalign.sections import ModelSection

MODELS = ("llava", "llava_next", "llava_onevision", "gemma3", *BY_PROCESSOR)
"""Model types whose parts are known here."""
DECODERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "gemma3_text",
)
"""Decoder types whose block is known here."""


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
    """RMS norms over each query and key head (Qwen3, Gemma 3)."""
    sandwiched: bool = False
    """Norms after attention and MLP too, whose gain is 1 + weight in float32 (Gemma 3)."""
    windows: tuple[int | None, ...] = ()
    """Sliding window of each block, None where it has none; empty: no block has one."""
    module: str = "language_model"
    """Its name in the model."""
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
        norms = (4 if self.sandwiched else 2) * self.width
        norms += 2 * self.head_dim if self.normed_heads else 0
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
    projector: Projector
    newline: bool
    """A trained embedding ends each row of image tokens (LLaVA-NeXT, LLaVA-OneVision)."""
    tiles: int
    """Most images that the tower sees for one image of the user (any-resolution tiles)."""
    image_tokens: int
    """Most tokens that one image of the user takes in the prefix, with the marks around it."""
    masked: bool = False
    """Image tokens see each other both ways, so that rows of branches need their mask (Gemma 3)."""

    @property
    def tile_tokens(self) -> int:
        """Rows that the projector makes of one image that the tower sees."""
        return self.projector.tokens

    @property
    def block(self) -> int:
        """Image tokens of a prefix that see each other both ways."""
        return self.tile_tokens if self.masked else 0

    @property
    def projector_parameters(self) -> int:
        """Parameters between tower and decoder, the newline embedding included."""
        return self.projector.parameters

    @property
    def parameters(self) -> int:
        """All parameters; a tied head is counted once."""
        return self.decoder.parameters + self.tower.parameters + self.projector_parameters


def config_of(section: ModelSection) -> Any:
    """The transformers config of a recipe's model: folder, Hub id or ``builtin:NAME``.

    Raises GeometryError where there is none.
    """
    try:
        return AutoConfig.from_pretrained(_place(section), revision=section.revision)
    except (OSError, ValueError) as error:
        raise GeometryError(f"model.path: no config at {section.path}: {error}") from error


def geometry_of(section: ModelSection) -> Geometry:
    """The geometry of a recipe's model, its image processor's settings read where they count.

    Raises GeometryError as ``read`` does, and where config or processor is missing.
    """
    config = config_of(section)
    if config.model_type not in BY_PROCESSOR:
        return read(config)
    try:
        made = AutoImageProcessor.from_pretrained(
            _place(section), revision=section.revision, backend="pil"
        )
    except (OSError, ValueError) as error:
        raise GeometryError(f"model.path: no image processor at {section.path}: {error}") from error
    return read(config, made)


def read(config: Any, image_processor: Any = None) -> Geometry:
    """The geometry of a transformers config. ``image_processor``: of the same model; it says how
    large an image may be where the config does not (``images``).

    Raises GeometryError for what is not known here.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in MODELS:
        raise GeometryError(
            f"model_type {kind!r} cannot be estimated; there are: {', '.join(MODELS)}. Write "
            "train.gradient_checkpointing: true or false instead of auto"
        )
    if kind in BY_PROCESSOR and image_processor is None:
        raise GeometryError(
            f"{kind}: the largest image is a setting of the image processor: give the model's own"
        )
    decoder = read_decoder(config.text_config, tied=bool(config.tie_word_embeddings))
    if kind in ("idefics3", "smolvlm"):
        decoder = replace(decoder, module="text_model")
    try:
        grid = largest_grid(config, image_processor) if kind.startswith("qwen") else None
        tower = read_tower(config.vision_config, grid)
        projector = read_projector(config, tower)
        tiles, image_tokens = most_tiles(config, tower, projector, image_processor)
    except ValueError as error:
        raise GeometryError(str(error)) from error
    return Geometry(
        model_type=kind,
        decoder=decoder,
        tower=tower,
        projector=projector,
        newline=kind in ("llava_next", "llava_onevision"),
        tiles=tiles,
        image_tokens=image_tokens,
        masked=kind == "gemma3",
    )


def read_decoder(config: Any, *, tied: bool) -> Decoder:
    """The decoder of a text config. Raises GeometryError for an unknown kind or sliding windows."""
    kind = config.model_type
    if kind not in DECODERS:
        raise GeometryError(
            f"text_config.model_type {kind!r} cannot be estimated; there are: {', '.join(DECODERS)}"
        )
    biased: set[str] = set()
    if kind in ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"):
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
        normed_heads=kind in ("qwen3", "qwen3_vl_text", "gemma3_text"),
        sandwiched=kind == "gemma3_text",
        windows=_windows(config),
        tied=tied,
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    """Of Gemma 3's blocks. Raises GeometryError for a decoder that is not causal."""
    if config.model_type != "gemma3_text":
        windowed = getattr(config, "sliding_window", None) is not None
        if windowed and getattr(config, "use_sliding_window", True):
            raise GeometryError(
                "text_config.sliding_window: attention over windows cannot be estimated"
            )
        return ()
    if config.use_bidirectional_attention:
        raise GeometryError(
            "text_config.use_bidirectional_attention: a prefix would see its completions"
        )
    sizes = {"full_attention": None, "sliding_attention": config.sliding_window}
    return tuple(sizes[each] for each in config.layer_types)


def _place(section: ModelSection) -> str:
    """Folder or Hub id."""
    path = section.path
    if path.startswith("builtin:"):
        return str(Path(__file__).parents[1] / path.removeprefix("builtin:") / "base")
    folder = Path(path).expanduser()
    return str(folder) if folder.is_dir() else path
