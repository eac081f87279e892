"""LLaVA-OneVision: rows of branches against separate stock forwards, ids and tiles against the
stock rules. Its whole processor cannot be built without torchvision; its methods can be called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from mlalign.branching.layout import LayoutError
from mlalign.models._processor import Parts
from mlalign.models._vlm import VLM
from mlalign.models.llava_onevision import METHOD as LlavaOnevision
from mlalign.models.loading import load_vlm_from
from tests.models import exact, tiled

SIZES = ((30, 18), (70, 40))
"""The second one's tiles are thinned."""
TILE, PATCH = 18, 4
"""4 x 4 patches; the last two pixels of a tile belong to none, as 6 of SigLIP's 384 do."""
PINPOINTS = [[TILE * rows, TILE * columns] for rows in range(1, 5) for columns in range(1, 5)]
ASPECT = "anyres_max_2"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As released: a prompt ends in "assistant\\n", an answer stands after "assistant \\n"."""


def processor(**settings: Any) -> Parts:
    marks = {"image_token": "<image>", "video_token": "<video>", "start": "<|im_start|>"}
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    tokenizer = tiled.tokenizer(marks, bos=False, eos="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    written = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (TILE // PATCH) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": ASPECT,
    }
    return Parts(image_processor, tokenizer, {**written, **settings})


def stock(parts: Any) -> LlavaOnevisionProcessor:
    """The stock processor's own methods, on its settings."""
    made = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    made.image_processor, made.image_token = parts.image_processor, "<image>"
    made.num_image_tokens = parts.num_image_tokens
    made.vision_feature_select_strategy = parts.vision_feature_select_strategy
    made.vision_aspect_ratio = parts.vision_aspect_ratio
    return made


def new_folder(folder: Path) -> Path:
    made = processor()
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=PATCH,
            vision_use_head=False,
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
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=ASPECT,
        image_token_index=made.tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=made.tokenizer.convert_tokens_to_ids("<video>"),
    )
    return tiled.save(folder, tiled.loud(LlavaOnevisionForConditionalGeneration(config)), made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_folder(tmp_path_factory.mktemp("llava_onevision"))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    """Without an adapter; not to be changed."""
    return load_vlm_from(folder, dtype="float32")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["dense", "split"])
def test_branches_are_exact(folder: Path, attention: str, packed: bool) -> None:
    vlm = tiled.adapted(folder)
    made = exact.case(vlm, SIZES)
    tiles = LlavaOnevision.tiles(vlm.processor, SIZES[1])
    assert LlavaOnevision.kept(vlm.processor, tiles) < tiles.shape
    assert len({prefix.count(vlm.image_token_id) for prefix in made.prefixes}) == 2
    exact.assert_exact(vlm, made, attention, packed=packed)


def test_a_trained_projector_is_exact(folder: Path) -> None:
    """Through the thinning too; one image comes twice."""
    vlm = tiled.adapted(folder)
    names = tiled.unfreeze(vlm, "multi_modal_projector", "image_newline")
    assert names and not vlm.sees_frozen
    exact.assert_exact(vlm, exact.case(vlm, SIZES), "split")


def test_bfloat16_rounds_as_the_stock_forward_does(folder: Path) -> None:
    """0.056 nats from float32 were measured, for the stock forward and branches alike."""
    tiled.assert_bfloat16(tiled.adapted(folder, "bfloat16"), SIZES, 0.15)


@pytest.mark.parametrize("size", [*SIZES, (18, 18), (70, 70), (4, 200)])
def test_ids_are_those_of_the_stock_rule(vlm: VLM, size: tuple[int, int]) -> None:
    image = exact.picture(*size, seed=5)
    prompt, answer = exact.PROMPTS[0], exact.ANSWERS[0][0]
    made = vlm.processor.image_processor(images=image, return_tensors="pt")
    expanded = stock(vlm.processor).replace_image_token(made, 0)
    wanted = []
    for talk, generation in (
        (tiled.messages(prompt), True),
        (tiled.messages(prompt, answer), False),
    ):
        text = vlm.tokenizer.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=generation
        )
        wanted.append(vlm.tokenizer(text.replace("<image>", expanded))["input_ids"])
    assert vlm.prefix_ids(prompt, size) == wanted[0]
    prefix, (branch,) = vlm.branch_ids(prompt, [answer], size)
    assert prefix + branch == wanted[1] and branch[-1] == vlm.tokenizer.eos_token_id
    # The template writes one character more before an answer than after a prompt.
    assert prefix == wanted[0][:-1]
    seen = vlm.image(image).tensors
    assert all(torch.equal(seen[key], made[key]) for key in ("pixel_values", "image_sizes"))


@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([1, 4, 9]))
@example(1920, 768, 9)
def test_token_counts_of_the_real_geometry(width: int, height: int, most: int) -> None:
    """Against the stock rule, for LLaVA-OneVision's own sizes; ten tiles are not thinned."""
    real = processor(num_image_tokens=729, vision_aspect_ratio=f"anyres_max_{most}")
    real.image_processor = LlavaOnevisionImageProcessorPil()
    made = {
        "image_sizes": [[height, width]],
        "pixel_values": torch.empty(1, 1, 3, 384, 384),
        "batch_num_images": [1],
    }
    assert LlavaOnevision.image_text(real, (width, height)) == stock(real).replace_image_token(
        made, 0
    )


def test_defaults_are_those_of_the_stock_class(vlm: VLM) -> None:
    """Released folders leave them out of processor_config.json."""
    bare = processor()
    del bare.settings["vision_aspect_ratio"]
    nine = processor(vision_aspect_ratio="anyres_max_9")
    size = (72, 72)
    assert LlavaOnevision.image_text(bare, size) == LlavaOnevision.image_text(nine, size)
    with pytest.raises(ValueError, match="vision_aspect_ratio: 'pad' is not served"):
        LlavaOnevision.image_text(processor(vision_aspect_ratio="pad"), size)


def test_a_model_that_thins_otherwise_is_refused_by_name(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="float32")
    vlm.processor.settings["vision_aspect_ratio"] = "anyres_max_9"
    made = exact.case(vlm, SIZES)
    ids = [[f"rec-{g}"] * len(c) for g, c in enumerate(made.completions)]
    batch = vlm.rows(made.prefixes, made.completions, made.inputs, ids=ids)
    with pytest.raises(LayoutError, match=r"rec-1: .* image tokens in the prompt, but"):
        vlm.encode(batch)


def test_generation_equals_stock(vlm: VLM) -> None:
    tiled.assert_generates(vlm, SIZES)


@pytest.mark.parametrize("size", [(36, 36), (30, 18), (70, 40), (40, 140)])
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
        image_newline=torch.tensor([torch.nan], dtype=torch.float64),
        vision_aspect_ratio=ASPECT,
    )
    tokens = vlm.prefix_ids("A", size).count(vlm.image_token_id)
    tiled.assert_boxes(vlm.patch_mask(place, size), packed[0][:, 0], tokens)
