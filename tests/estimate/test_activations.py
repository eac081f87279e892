"""Bytes that autograd really keeps, by torch's own hooks, against the closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from mlalign.estimate import activations
from mlalign.estimate.plan import Plan
from mlalign.estimate.rows import PlanError, Rows
from mlalign.sections import LoraSection
from tests.estimate import tiny

ROWS = Rows(prefix=90, completions=(20, 31))
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}
SOME = r".*language_model\.layers\."


def kept(model: Any, run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves during ``run``, parameters left out."""
    known = {each.untyped_storage().data_ptr() for each in model.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            # Held here, so that no address is given out twice.
            held[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = run()
    assert states.requires_grad
    return sum(each.untyped_storage().nbytes() for each in held.values())


LORA = LoraSection(rank=4)


def case(text: Any = None, lora: LoraSection | None = LORA, **plan: Any) -> Any:
    rows = plan.pop("rows", ROWS)
    return tiny.model_and_plan(tiny.config(text), rows, lora=lora, **plan)


@pytest.mark.parametrize(
    ("text", "lora", "dtype"),
    [
        (None, LoraSection(rank=4), torch.float32),
        (None, LoraSection(rank=32), torch.bfloat16),
        (LlamaConfig(**SHAPE), LoraSection(rank=4), torch.float32),
        (
            LlamaConfig(**SHAPE, num_key_value_heads=4, head_dim=16),
            LoraSection(rank=4),
            torch.float,
        ),
        (Qwen2Config(**SHAPE, num_key_value_heads=2), LoraSection(rank=4), torch.float32),
        (Qwen3Config(**SHAPE, num_key_value_heads=2), LoraSection(rank=4), torch.float32),
        (Qwen3Config(**SHAPE, num_key_value_heads=2), LoraSection(rank=4), torch.bfloat16),
        (None, LoraSection(rank=4, targets=SOME + r"\d\.self_attn\.(q|v)_proj"), torch.float32),
        (None, LoraSection(rank=4, targets=SOME + r"\d\.self_attn\.o_proj"), torch.float32),
        (None, LoraSection(rank=4, targets=SOME + r"[23]\.mlp\.(gate|down)_proj"), torch.float32),
        (None, LoraSection(rank=4, targets=SOME + r"1\.self_attn\.k_proj"), torch.float32),
    ],
    ids=[
        "llama",
        "bf16",
        "no sharing of heads",
        "narrow heads",
        "qwen2",
        "qwen3",
        "qwen3 bf16",
        "q and v",
        "o",
        "late mlp",
        "one k",
    ],
)
def test_shared_row_with_lora(text: Any, lora: LoraSection, dtype: torch.dtype) -> None:
    model, geometry, plan = case(text, lora, dtype=dtype)
    inputs = tiny.shared_row(ROWS, dtype)
    measured = kept(model, lambda: tiny.hidden(model, inputs))
    assert activations.saved(geometry, plan) == measured


def test_bf16_under_autocast_copies_the_adapters_inputs() -> None:
    model, geometry, plan = case(dtype=torch.bfloat16, trained_bytes=4, copy_bytes=2, cast_bytes=2)
    inputs = tiny.shared_row(ROWS, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        measured = kept(model, lambda: tiny.hidden(model, inputs))
    assert activations.saved(geometry, plan) == measured


@pytest.mark.parametrize("heads", [8, 2])
@pytest.mark.parametrize("save", [(), ("multi_modal_projector",)], ids=["lora", "projector"])
def test_padded_pair_without_a_mask(save: tuple[str, ...], heads: int) -> None:
    rows = Rows(prefix=90, completions=(31, 31), layout="padded")
    lora = LoraSection(rank=4, modules_to_save=save)
    model, geometry, plan = case(
        LlamaConfig(**SHAPE, num_key_value_heads=heads), lora, rows=rows, attention="causal"
    )
    inputs = tiny.padded_rows(rows)
    inputs["position_ids"] = torch.arange(rows.lengths[0]).repeat(2, 1)
    measured = kept(model, lambda: tiny.hidden(model, inputs, trained_projector=bool(save)))
    found = activations.saved(geometry, plan)
    if save:
        # The features themselves are not kept, only what the projector made them from.
        width = geometry.decoder.width
        found += activations.features(geometry, plan) - geometry.tile_tokens * width * 4
    assert found == measured


def test_full_fine_tuning() -> None:
    model, geometry, plan = case(lora=None)
    inputs = tiny.shared_row(ROWS, torch.float32)
    measured = kept(model, lambda: tiny.hidden(model, inputs))
    assert activations.saved(geometry, plan) == measured


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block() -> None:
    model, geometry, plan = case(checkpointing=True)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    inputs = tiny.shared_row(ROWS, torch.float32)
    measured = kept(model, lambda: tiny.hidden(model, inputs))
    # The mask, cos and sin are held by the blocks' closures, where these hooks do not look.
    held = activations.shared_by_blocks(geometry.decoder, plan)
    assert activations.saved(geometry, plan) - held == measured


def test_more_rows_keep_as_many_times_more() -> None:
    _, geometry, plan = case()
    three = replace(plan, pairs=3)
    assert activations.saved(geometry, three) == 3 * activations.saved(geometry, plan)


def test_the_shared_row_keeps_less_than_the_padded_pair() -> None:
    _, geometry, shared = case(rows=Rows(prefix=600, completions=(100, 100)))
    padded = Plan(
        rows=Rows(prefix=600, completions=(100, 100), layout="padded"), adapter=shared.adapter
    )
    ratio = activations.saved(geometry, shared) / activations.saved(geometry, padded)
    assert 800 / 1400 < ratio < 0.65


def test_attention_without_a_mask_is_refused_for_a_shared_row() -> None:
    with pytest.raises(PlanError, match="causal"):
        Plan(rows=Rows(prefix=9, completions=(2,)), attention="causal")
