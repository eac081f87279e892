"""LLaVA-NeXT: rows of branches against separate stock forwards, ids and tiles against the stock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from mlalign.branching.layout import LayoutError
from mlalign.models._vlm import VLM
from mlalign.models.llava_next import METHOD as LlavaNext
from mlalign.models.loading import load_vlm_from
from tests.models import exact, tiled

SIZES = ((90, 60), (40, 100))
TILE, PATCH = 32, 8
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'][0]['text'] + '</s>' }}{% endif %}{% endfor %}"
)
"""As that of the Mistral models: no BOS, which their tokenizer adds."""


def processor() -> LlavaNextProcessor:
    marks = {"image_token": "<image>", "inst": "[INST]", "inst_end": "[/INST]"}
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer=tiled.tokenizer(marks, bos=True),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def new_folder(folder: Path, window: int | None = None) -> Path:
    made = processor()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=PATCH,
            projection_dim=32,
        ),
        text_config=MistralConfig(
            vocab_size=len(made.tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=512,
            sliding_window=window,
        ),
        image_grid_pinpoints=PINPOINTS,
        image_token_index=made.image_token_id,
        vision_feature_layer=-2,
    )
    return tiled.save(folder, tiled.loud(LlavaNextForConditionalGeneration(config)), made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_folder(tmp_path_factory.mktemp("llava_next"))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    """Without an adapter; not to be changed."""
    return load_vlm_from(folder, dtype="float32")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["dense", "split"])
def test_branches_are_exact(folder: Path, attention: str, packed: bool) -> None:
    vlm = tiled.adapted(folder)
    made = exact.case(vlm, SIZES)
    assert len({prefix.count(vlm.image_token_id) for prefix in made.prefixes}) == 2
    exact.assert_exact(vlm, made, attention, packed=packed)


def test_a_sliding_window_is_exact(tmp_path: Path) -> None:
    """Mistral's first version has one: smaller here than the image, so that it cuts prefixes."""
    vlm = tiled.adapted(new_folder(tmp_path, window=24))
    exact.assert_exact(vlm, exact.case(vlm, SIZES), "dense")


def test_a_trained_projector_is_exact(folder: Path) -> None:
    """Gradients reach the projector and the newline from every branch; one image comes twice."""
    vlm = tiled.adapted(folder)
    names = tiled.unfreeze(vlm, "multi_modal_projector", "image_newline")
    assert names and not vlm.sees_frozen
    exact.assert_exact(vlm, exact.case(vlm, SIZES), "split")


def test_bfloat16_rounds_as_the_stock_forward_does(folder: Path) -> None:
    """0.052 nats from float32 were measured, for the stock forward and branches alike."""
    tiled.assert_bfloat16(tiled.adapted(folder, "bfloat16"), SIZES, 0.15)


@pytest.mark.parametrize("size", [*SIZES, (64, 64), (33, 97), (7, 200)])
@pytest.mark.parametrize("answer", [None, "A red kettle stands on a table."])
def test_ids_are_those_of_the_stock_processor(
    vlm: VLM, size: tuple[int, int], answer: str | None
) -> None:
    image = exact.picture(*size, seed=5)
    prompt = exact.PROMPTS[0]
    talk = tiled.messages(prompt, answer)
    talk[0]["content"][0]["image"] = image
    stock = vlm.processor.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = stock["input_ids"][0].tolist()
    assert ids[0] == vlm.tokenizer.bos_token_id != ids[1]
    if answer is None:
        assert vlm.prefix_ids(prompt, size) == ids
    else:
        prefix, (branch,) = vlm.branch_ids(prompt, [answer], size)
        assert prefix == vlm.prefix_ids(prompt, size)
        assert prefix + branch == ids and branch[-1] == vlm.tokenizer.eos_token_id
    seen = vlm.image(image).tensors
    assert all(torch.equal(seen[key], stock[key]) for key in ("pixel_values", "image_sizes"))


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_token_counts_of_the_real_geometry(width: int, height: int) -> None:
    """Against the stock rule, for LLaVA-1.6's own sizes."""
    real = processor()
    real.patch_size = 14
    real.image_processor.size = {"shortest_edge": 336}
    real.image_processor.crop_size = {"height": 336, "width": 336}
    real.image_processor.image_grid_pinpoints = [
        [336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]
    ]  # fmt: skip
    pixels = torch.empty(1, 1, 3, 336, 336)
    sizes = [[height, width]]
    stock = real.replace_image_token({"image_sizes": sizes, "pixel_values": pixels}, 0)
    assert LlavaNext.image_text(real, (width, height)) == stock
    assert len(LlavaNext.image_text(real, (672, 672))) == 2928 * len("<image>")


def test_a_wrong_token_count_is_refused_by_name(vlm: VLM) -> None:
    made = exact.case(vlm, SIZES)
    made.prefixes[1].remove(vlm.image_token_id)
    ids = [[f"rec-{g}"] * len(c) for g, c in enumerate(made.completions)]
    batch = vlm.rows(made.prefixes, made.completions, made.inputs, ids=ids)
    with pytest.raises(LayoutError, match=r"rec-1: .* image tokens in the prompt, but"):
        vlm.encode(batch)


def test_each_tile_is_encoded_once_and_none_for_padding(vlm: VLM) -> None:
    made = exact.case(vlm, SIZES)
    seen = []
    hook = vlm.core.model.vision_tower.register_forward_pre_hook(
        lambda module, args, keys: seen.append((*args, *keys.values())[0].shape[0]),
        with_kwargs=True,
    )
    try:
        batch = vlm.encode(vlm.rows(made.prefixes, made.completions, made.inputs))
    finally:
        hook.remove()
    tiles = [inputs.tensors["pixel_values"].shape[1] for inputs in made.inputs]
    assert tiles[0] != tiles[1] and seen == [tiles[0] + tiles[1]]
    assert batch.features.pooler_output[0] is batch.features.pooler_output[2]


def test_generation_equals_stock(vlm: VLM) -> None:
    tiled.assert_generates(vlm, SIZES)


@pytest.mark.parametrize("size", [(64, 64), (190, 60), (50, 130)])
@pytest.mark.parametrize("box", [(0.0, 0.0, 0.34, 0.3), (0.4, 0.45, 0.7, 0.8)])
def test_boxes_against_painted_pixels(
    vlm: VLM, size: tuple[int, int], box: tuple[float, float, float, float]
) -> None:
    """The model's own packing, given shares of changed pixels in place of features."""
    width, height = size
    place = tiled.pixels(box, size)
    share = tiled.changed(vlm, size, place, PATCH)
    packed, _ = vlm.core.model.pack_image_features(
        [share[..., None]],
        torch.tensor([[height, width]]),
        vision_feature_select_strategy="default",
        image_newline=torch.tensor([torch.nan], dtype=torch.float64),
    )
    tokens = vlm.prefix_ids("A", size).count(vlm.image_token_id)
    tiled.assert_boxes(vlm.patch_mask(place, size), packed[0][:, 0], tokens)


def test_what_has_no_grid_is_refused(vlm: VLM) -> None:
    with pytest.raises(NotImplementedError, match="LlavaNext"):
        vlm.grid((64, 64))
    with pytest.raises(ValueError, match=r"model\.image: pad"):
        replace(vlm, image_mode="pad").image(exact.picture(64, 64, 0))


def test_a_blank_image_keeps_the_layout(vlm: VLM) -> None:
    seen = vlm.image(exact.picture(*SIZES[0], seed=0))
    blank = vlm.blank(seen)
    assert not blank.tensors["pixel_values"].any() and blank.size == seen.size
    found = vlm.features([seen, blank]).pooler_output
    assert found[0].shape == found[1].shape and not torch.equal(*found)
