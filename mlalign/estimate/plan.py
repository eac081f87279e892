"""What is computed in a step: the rows, what trains, in which numbers, on how many processes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mlalign.estimate.geometry import Decoder, Geometry
from mlalign.estimate.rows import PlanError, Rows
from mlalign.recipe import Recipe
from mlalign.sections import LoraSection

Attention = Literal["dense", "causal", "split"]

PROMPT_TOKENS = 24
"""Tokens of a prompt's text and template where nobody says: 600 with LLaVA-1.5's 576."""
COMPLETION_TOKENS = 200
"""Tokens of a completion where nobody says."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """LoRA on linears of the decoder's blocks."""

    rank: int
    where: Mapping[str, frozenset[int]]
    """Name of a linear -> the blocks in which it is adapted."""

    def of(self, layer: int) -> frozenset[str]:
        """Linears adapted in one block."""
        return frozenset(name for name, layers in self.where.items() if layer in layers)

    def parameters(self, decoder: Decoder) -> int:
        """Parameters of A and B: rank x (inputs + outputs) for each adapted linear."""
        sizes = decoder.linears
        return self.rank * sum(sum(sizes[name]) * len(at) for name, at in self.where.items())


class Tracked(NamedTuple):
    """What has a gradient in one block: its input, the attention, the residual stream between
    attention and MLP, the two inner activations, the block's output."""

    input: bool
    attention: bool
    middle: bool
    gate: bool
    up: bool
    output: bool

    def reaches(self, linear: str) -> bool:
        """Whether the input of a linear has a gradient."""
        if linear == "down_proj":
            return self.gate or self.up
        if linear in ("gate_proj", "up_proj"):
            return self.middle
        return self.attention if linear == "o_proj" else self.input


def track(targets: frozenset[str], tracked: bool) -> Tracked:
    """How the gradient reaches through a frozen block with LoRA on ``targets``, where its input
    has one or not. Below the first adapted linear nothing is kept and nothing is computed."""
    attention = tracked or bool(targets & {"q_proj", "k_proj", "v_proj"})
    middle = attention or "o_proj" in targets
    gate, up = middle or "gate_proj" in targets, middle or "up_proj" in targets
    output = gate or up or "down_proj" in targets
    return Tracked(tracked, attention, middle, gate, up, output)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything of a recipe that costs."""

    rows: Rows
    pairs: int = 1
    """Rows (of K completions) in one forward on one process."""
    step_pairs: int = 1
    """Rows of an optimiser step over all processes."""
    adapter: Adapter | None = None
    """None: full fine-tuning of decoder and projector; the tower stays frozen."""
    projector: bool = False
    """Whether the projector trains beside the adapter."""
    dtype_bytes: int = 4
    quantize: Literal["none", "4bit", "8bit"] = "none"
    trained_bytes: int = 4
    """Of one trained weight."""
    copy_bytes: int = 0
    """Bytes per element of the copy that each adapted linear makes of its own input because its
    adapter has another dtype; 0: the dtypes are one and nothing is copied."""
    cast_bytes: int = 0
    """Bytes per adapter weight of its cast under autocast, which the backward keeps."""
    checkpointing: bool = False
    reference_live: bool = True
    zero: Literal[0, 2, 3] = 0
    offload: bool = False
    processes: int = 1
    cuda: bool = False
    """Whether the step runs on a GPU: split attention then joins keys for the flash kernel."""
    attention: Attention = "dense"
    """dense: SDPA under an additive mask; causal: SDPA without a mask (separate or padded rows
    only); split: prefix and first completion as an ordinary row, each further block of
    completions with prefix and itself (``branching.split``)."""

    def __post_init__(self) -> None:
        if self.attention == "causal" and self.rows.layout == "shared":
            raise PlanError("attention 'causal' is not exact for a shared row: dense or split")

    @property
    def input_tracked(self) -> bool:
        """Whether the first block's input has a gradient: what feeds it trains, or checkpointing
        asks for one (PEFT's ``enable_input_require_grads``)."""
        return self.adapter is None or self.projector or self.checkpointing


def adapter_of(section: LoraSection, decoder: Decoder) -> Adapter:
    """The adapter of a recipe's section. Raises PlanError where its targets hit no linear."""
    where = {
        name: frozenset(
            layer
            for layer in range(decoder.layers)
            if section.targets is None or re.fullmatch(section.targets, _path(decoder, layer, name))
        )
        for name in decoder.linears
    }
    if not any(where.values()):
        raise PlanError(
            f"model.adapter.targets: {section.targets!r} matches no linear of the decoder's "
            f"blocks, e.g. {_path(decoder, 0, 'q_proj')}"
        )
    return Adapter(rank=section.rank, where=where)


def plan_of(
    recipe: Recipe,
    geometry: Geometry,
    *,
    rows: Rows | None = None,
    dtype: str | None = None,
    checkpointing: bool = False,
    reference_live: bool = True,
    attention: Attention = "split",
) -> Plan:
    """The plan of a recipe. ``rows``: None takes ``rows_of``; ``dtype``: None asks the hardware
    where the recipe says auto. Raises PlanError, naming the key."""
    section, launch = recipe.model, recipe.launch
    lora = None if section.adapter == "none" else section.adapter
    _check_saved(lora.modules_to_save if lora else (), geometry)
    if lora is None and section.quantize != "none":
        raise PlanError("model.quantize: quantised weights do not train; give model.adapter")
    dtype = dtype or auto_dtype(section.dtype)
    sharded = launch.launcher == "deepspeed" and launch.zero > 0
    trained, copied, cast = _adapter_dtype(dtype, section.quantize != "none", sharded)
    import torch

    return Plan(
        cuda=torch.cuda.is_available(),
        rows=rows or rows_of(recipe, geometry),
        pairs=recipe.train.micro_batch_size,
        step_pairs=recipe.train.batch_size,
        adapter=adapter_of(lora, geometry.decoder) if lora else None,
        projector=bool(lora and lora.modules_to_save),
        dtype_bytes=BYTES[dtype],
        quantize=section.quantize,
        trained_bytes=trained if lora else BYTES[dtype],
        copy_bytes=copied if lora else 0,
        cast_bytes=cast if lora else 0,
        checkpointing=checkpointing,
        reference_live=reference_live,
        zero=launch.zero if sharded else 0,
        offload=launch.offload and sharded,
        processes=launch.processes,
        # Image blocks and sliding windows need the mask.
        attention="dense" if geometry.masked else attention,
    )


def rows_of(
    recipe: Recipe,
    geometry: Geometry,
    *,
    prompt: int = PROMPT_TOKENS,
    completion: int = COMPLETION_TOKENS,
) -> Rows:
    """A pair of equal completions behind the longest image prefix that the config allows, cut to
    train.max_length. Raises PlanError where that leaves no completion token."""
    prefix = geometry.image_tokens + prompt
    limit = recipe.train.max_length
    length = completion if limit is None else min(completion, limit - prefix)
    if length < 1:
        raise PlanError(
            f"train.max_length {limit} leaves no completion token behind a prefix of {prefix} "
            f"({geometry.image_tokens} of the image): raise it to {prefix + completion}"
        )
    return Rows(
        prefix=prefix,
        completions=(length, length),
        layout=recipe.train.layout,
        tiles=geometry.tiles,
    )


def auto_dtype(name: str) -> str:
    """The dtype that a recipe's ``model.dtype`` comes to on this machine."""
    if name != "auto":
        return name
    import torch

    has: Any = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bfloat16" if has else "float32"


def _adapter_dtype(dtype: str, quantized: bool, sharded: bool) -> tuple[int, int, int]:
    """(bytes of an adapter weight, of a copied input, of a cast weight). PEFT makes adapters
    float32; TRL makes a quantised model's bfloat16; DeepSpeed makes a bfloat16 module bfloat16 as
    a whole; and bfloat16 without ZeRO trains under autocast."""
    if quantized:
        return 2, 0 if dtype == "bfloat16" else 2, 0
    if dtype == "float32":
        return 4, 0, 0
    if dtype == "bfloat16":
        return (2, 0, 0) if sharded else (4, 2, 2)
    return 4, 4, 0


def _path(decoder: Decoder, layer: int, name: str) -> str:
    part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.{decoder.module}.layers.{layer}.{part}.{name}"


def _check_saved(names: tuple[str, ...], geometry: Geometry) -> None:
    """Raise PlanError where not the whole projector, or more than it, trains beside LoRA."""
    # PEFT takes a name for every module whose own name ends in it.
    modules = geometry.projector.modules
    unknown = [name for name in names if not any(m.endswith(name) for m in modules)]
    left = [m for m in modules if not any(m.endswith(name) for name in names)]
    if unknown or (names and left):
        raise PlanError(
            f"model.adapter.modules_to_save: {(unknown or list(names))[0]!r} cannot be estimated; "
            f"only the whole projector: {', '.join(m.removeprefix('model.') for m in modules)}"
        )
