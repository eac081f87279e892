"""A small random LLaVA on stock transformers, a hand-made shared row, and a loss over it."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mlalign.estimate.geometry import Geometry, read
from mlalign.estimate.plan import Plan, adapter_of
from mlalign.estimate.rows import Rows
from mlalign.sections import LoraSection

EVERY = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"
IMAGE_ID = 3


def config(text: Any = None, **keys: Any) -> LlavaConfig:
    """Four layers of 256, eight heads of 32, two key-value heads, 16 image tokens."""
    shape: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=text or LlamaConfig(**{**shape, **keys}),
        image_token_index=IMAGE_ID,
    )


def model_and_plan(
    made: LlavaConfig,
    rows: Rows,
    *,
    lora: LoraSection | None,
    dtype: torch.dtype = torch.float32,
    **plan: Any,
) -> tuple[Any, Geometry, Plan]:
    """The model with the adapter of ``lora`` (None: full fine-tuning) and the plan of one row."""
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration._from_config(made, dtype=dtype)
    geometry = read(made)
    if lora is None:
        model.model.vision_tower.requires_grad_(False)
    else:
        wanted = LoraConfig(
            r=lora.rank,
            target_modules=lora.targets or EVERY,
            modules_to_save=list(lora.modules_to_save) or None,
        )
        model = get_peft_model(model, wanted, autocast_adapter_dtype=plan.get("copy_bytes", 0) > 0)
    adapter = adapter_of(lora, geometry.decoder) if lora else None
    bytes_of = torch.finfo(dtype).bits // 8
    keys = {"dtype_bytes": bytes_of, "projector": bool(lora and lora.modules_to_save), **plan}
    return model, geometry, Plan(rows=rows, adapter=adapter, **keys)


def core_of(model: Any) -> Any:
    """The transformers model inside PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shared_row(rows: Rows, dtype: torch.dtype) -> dict[str, Tensor]:
    """ids (1, T), position_ids (1, T) and the additive mask (1, 1, T, T) of one shared row."""
    segment = [0] * rows.prefix
    positions = list(range(rows.prefix))
    for number, length in enumerate(rows.completions, 1):
        segment += [number] * length
        positions += range(rows.prefix, rows.prefix + length)
    segment_T = torch.tensor(segment)
    total = len(segment)
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    seen = causal & ((segment_T[:, None] == segment_T) | (segment_T == 0))
    mask = torch.zeros(1, 1, total, total, dtype=dtype)
    ids = torch.full((1, total), 7)
    ids[:, :16] = IMAGE_ID
    return {
        "input_ids": ids,
        "position_ids": torch.tensor([positions]),
        "attention_mask": mask.masked_fill_(~seen, torch.finfo(dtype).min),
    }


def padded_rows(rows: Rows) -> dict[str, Tensor]:
    """ids (K, T) of rows of one length, which need no mask."""
    ids = torch.full((len(rows.lengths), rows.lengths[0]), 7)
    ids[:, :16] = IMAGE_ID
    return {"input_ids": ids}


def hidden(model: Any, inputs: dict[str, Tensor], *, trained_projector: bool = False) -> Tensor:
    """Last hidden state (R, T, D); the tower runs once, without gradient, for all rows."""
    core = core_of(model)
    pixels = torch.zeros(1, 3, 56, 56, dtype=core.dtype)
    with torch.set_grad_enabled(trained_projector):
        image = core.model.get_image_features(pixels, return_dict=True)
    image.pooler_output = list(image.pooler_output) * inputs["input_ids"].shape[0]
    return core.model(**inputs, mm_encoder_outputs={"image": image}, use_cache=False)[0]
