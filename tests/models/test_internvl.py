"""InternVL: rows of branches against separate stock forwards, ids and tiles against the stock
rules. Its whole processor cannot be built without torchvision; its methods can be called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from mlalign.branching.layout import LayoutError
from mlalign.models._processor import Parts
from mlalign.models._vlm import VLM
from mlalign.models.internvl import METHOD as InternVL
from mlalign.models.loading import load_vlm_from
from tests.models import exact, tiled

SIZES = ((90, 40), (30, 32))
"""Two tiles and the whole; one tile."""
TILE, PATCH = 32, 4
TOKENS = (TILE // PATCH // 2) ** 2
MARKS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "start": "<|im_start|>",
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def processor(max_patches: int = 4, tile: int = TILE, tokens: int = TOKENS) -> Parts:
    """As released: the image processor's own file says crop_to_patches: false."""
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": tile, "width": tile}, max_patches=max_patches, crop_to_patches=False
    )
    tokenizer = tiled.tokenizer(MARKS, bos=False, eos="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    written = {"processor_class": "InternVLProcessor", "image_seq_length": tokens}
    return Parts(image_processor, tokenizer, written)


def stock_text(parts: Any, tiles: int) -> str:
    """What the stock processor's own method writes for an image of so many tiles."""
    made = InternVLProcessor.__new__(InternVLProcessor)
    made.image_seq_length, made.image_token = parts.image_seq_length, "<IMG_CONTEXT>"
    made.start_image_token, made.end_image_token = "<img>", "</img>"
    return made.replace_image_token({"num_patches": [tiles]}, 0)


def new_folder(folder: Path) -> Path:
    made = processor()
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=PATCH,
        ),
        text_config=Qwen2Config(
            vocab_size=len(made.tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        ),
        image_token_id=made.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    return tiled.save(folder, tiled.loud(InternVLForConditionalGeneration(config)), made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_folder(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    """Without an adapter; not to be changed."""
    return load_vlm_from(folder, dtype="float32")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["dense", "split"])
def test_branches_are_exact(folder: Path, attention: str, packed: bool) -> None:
    vlm = tiled.adapted(folder)
    made = exact.case(vlm, SIZES)
    counts = [prefix.count(vlm.image_token_id) for prefix in made.prefixes]
    assert counts == [3 * TOKENS, TOKENS, 3 * TOKENS]
    exact.assert_exact(vlm, made, attention, packed=packed)


def test_a_trained_projector_is_exact(folder: Path) -> None:
    """One image comes twice."""
    vlm = tiled.adapted(folder)
    names = tiled.unfreeze(vlm, "multi_modal_projector")
    assert names and not vlm.sees_frozen
    exact.assert_exact(vlm, exact.case(vlm, SIZES), "split")


def test_bfloat16_rounds_as_the_stock_forward_does(folder: Path) -> None:
    """0.056 nats from float32 were measured, for the stock forward and branches alike."""
    tiled.assert_bfloat16(tiled.adapted(folder, "bfloat16"), SIZES, 0.15)


@pytest.mark.parametrize("size", [*SIZES, (70, 70), (20, 100), (3, 200)])
def test_ids_are_those_of_the_stock_rule(vlm: VLM, size: tuple[int, int]) -> None:
    image = exact.picture(*size, seed=5)
    prompt, answer = exact.PROMPTS[0], exact.ANSWERS[0][0]
    # The keywords that the stock processor gives its image processor.
    made = vlm.processor.image_processor(
        images=image, **{"return_tensors": "pt", **InternVLProcessor.images_kwargs}
    )
    expanded = stock_text(vlm.processor, int(made["num_patches"][0]))
    wanted = []
    for talk, generation in (
        (tiled.messages(prompt), True),
        (tiled.messages(prompt, answer), False),
    ):
        text = vlm.tokenizer.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=generation
        )
        wanted.append(vlm.tokenizer(text.replace("<IMG_CONTEXT>", expanded))["input_ids"])
    assert vlm.prefix_ids(prompt, size) == wanted[0]
    prefix, (branch,) = vlm.branch_ids(prompt, [answer], size)
    assert prefix == wanted[0] and prefix + branch == wanted[1]
    assert vlm.tokenizer.eos_token_id in branch
    assert torch.equal(vlm.image(image).tensors["pixel_values"], made["pixel_values"])


@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([1, 6, 12]))
def test_token_counts_of_the_real_geometry(width: int, height: int, most: int) -> None:
    """Against the image processor's own count and the stock rule, for InternVL3's sizes."""
    real = processor(most, 448, 256)
    tiles = real.image_processor.get_number_of_image_patches(
        height, width, dict(InternVLProcessor.images_kwargs)
    )
    assert InternVL.image_text(real, (width, height)) == stock_text(real, tiles)


def test_a_wrong_token_count_is_refused_by_name(vlm: VLM) -> None:
    made = exact.case(vlm, SIZES)
    made.inputs[1] = made.inputs[0]
    ids = [[f"rec-{g}"] * len(c) for g, c in enumerate(made.completions)]
    batch = vlm.rows(made.prefixes, made.completions, made.inputs, ids=ids)
    with pytest.raises(LayoutError, match=r"rec-1: 16 image tokens in the prompt, but 48 features"):
        vlm.encode(batch)


def test_generation_equals_stock(vlm: VLM) -> None:
    tiled.assert_generates(vlm, SIZES, **InternVLProcessor.images_kwargs)


@pytest.mark.parametrize("size", [(32, 32), (70, 70), (190, 60), (50, 130)])
@pytest.mark.parametrize("box", [(0.0, 0.0, 0.34, 0.3), (0.4, 0.45, 0.7, 0.8)])
def test_boxes_against_painted_pixels(
    vlm: VLM, size: tuple[int, int], box: tuple[float, float, float, float]
) -> None:
    place = tiled.pixels(box, size)
    share = tiled.changed(vlm, size, place, 2 * PATCH).flatten()
    tokens = vlm.prefix_ids("A", size).count(vlm.image_token_id)
    tiled.assert_boxes(vlm.patch_mask(place, size), share, tokens)


def test_tokens_lie_row_by_row(vlm: VLM) -> None:
    """What a token of a tile is made of, after the model's own pixel shuffle."""
    side = TILE // PATCH
    places = torch.arange(side * side, dtype=torch.float32).reshape(1, side, side, 1)
    shuffled = vlm.core.model.pixel_shuffle(places.expand(-1, -1, -1, 2).contiguous(), 0.5)
    rows, columns = vlm.grid((32, 32))
    assert shuffled.shape[1:3] == (rows, columns)
    for row in range(rows):
        for column in range(columns):
            made_of = set(shuffled[0, row, column].int().tolist())
            down, across = (
                torch.tensor(sorted(made_of)) // side,
                torch.tensor(sorted(made_of)) % side,
            )
            assert set((down // 2).tolist()) == {row} and set((across // 2).tolist()) == {column}


def test_an_image_in_tiles_has_no_grid(vlm: VLM) -> None:
    with pytest.raises(NotImplementedError, match=r"\(90, 40\) is seen in tiles and as a whole"):
        vlm.grid(SIZES[0])


def test_a_blank_image_keeps_the_layout(vlm: VLM) -> None:
    seen = vlm.image(exact.picture(*SIZES[0], seed=0))
    blank = vlm.blank(seen)
    assert not blank.tensors["pixel_values"].any() and blank.size == seen.size
    both = vlm.features([seen, blank]).pooler_output[0]
    assert both.shape[0] == 6 * TOKENS
    assert not torch.equal(both[: 3 * TOKENS], both[3 * TOKENS :])
