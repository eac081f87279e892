"""Parameter counts against the model itself on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

import mlalign
from mlalign.estimate.geometry import GeometryError, config_of, read, read_decoder
from mlalign.sections import ModelSection

SHAPE: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
CLIP = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
)
SIGLIP = SiglipVisionConfig(
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
)


def counted(model: torch.nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE),
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        LlamaConfig(**SHAPE, head_dim=16),
        MistralConfig(**SHAPE, sliding_window=None, head_dim=8),
        Qwen2Config(**SHAPE),
        Qwen2Config(**SHAPE, tie_word_embeddings=True),
        Qwen3Config(**SHAPE, head_dim=16),
    ],
    ids=lambda config: config.model_type,
)
def test_decoder_parameters(config: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    decoder = read_decoder(config, tied=config.tie_word_embeddings)
    assert decoder.parameters == counted(model)
    assert decoder.block_parameters == counted(model.model.layers[0])
    sizes = {
        name.rpartition(".")[2]: (each.in_features, each.out_features)
        for name, each in model.model.layers[0].named_modules()
        if isinstance(each, torch.nn.Linear)
    }
    assert decoder.linears == sizes


@pytest.mark.parametrize(
    "config",
    [
        LlavaConfig(vision_config=CLIP, text_config=LlamaConfig(**SHAPE)),
        LlavaConfig(
            vision_config=CLIP,
            text_config=LlamaConfig(**SHAPE),
            vision_feature_layer=[-2, -1],
            multimodal_projector_bias=False,
        ),
        LlavaConfig(
            vision_config=SIGLIP,
            text_config=Qwen2Config(**SHAPE),
            vision_feature_select_strategy="full",
        ),
        LlavaNextConfig(vision_config=CLIP, text_config=LlamaConfig(**SHAPE)),
        LlavaOnevisionConfig(vision_config=SIGLIP, text_config=Qwen2Config(**SHAPE)),
        AutoConfig.from_pretrained(Path(mlalign.__file__).parent / "microworld" / "base"),
        LlavaConfig(text_config=LlamaConfig(vocab_size=32064)),
    ],
    ids=["clip", "two layers", "siglip", "next", "onevision", "microworld", "llava-1.5-7b"],
)
def test_parameters_of_every_part(config: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    geometry = read(config)
    assert geometry.tower.parameters == counted(model.model.vision_tower)
    newline = config.text_config.hidden_size if geometry.newline else 0
    projector = counted(model.model.multi_modal_projector) + newline
    assert geometry.projector_parameters == projector
    assert geometry.parameters == counted(model)


def test_image_tokens_of_one_image() -> None:
    assert read(LlavaConfig(text_config=LlamaConfig(vocab_size=32064))).image_tokens == 576
    after = read(LlavaNextConfig(text_config=LlamaConfig(vocab_size=32064)))
    assert (after.tiles, after.image_tokens) == (5, 576 + 48 * 49)


def test_a_builtin_model_is_read_by_name() -> None:
    geometry = read(config_of(ModelSection(path="builtin:microworld")))
    assert (geometry.decoder.layers, geometry.decoder.width, geometry.image_tokens) == (4, 192, 36)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AutoConfig.for_model("paligemma"), "paligemma.*llava_next"),
        (LlavaConfig(text_config=AutoConfig.for_model("gpt2")), "gpt2.*qwen3"),
        (LlavaConfig(text_config=MistralConfig(sliding_window=64)), "sliding_window"),
        (LlavaConfig(vision_config=AutoConfig.for_model("bert")), "vision_config.*bert"),
    ],
    ids=["model", "decoder", "window", "tower"],
)
def test_what_is_not_known_is_refused(config: Any, words: str) -> None:
    with pytest.raises(GeometryError, match=words):
        read(config)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(GeometryError, match=r"model\.path.*nowhere"):
        config_of(ModelSection(path="/nowhere/at/all"))
