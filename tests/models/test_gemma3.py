"""Gemma 3: a mask per kind of layer, an image block both ways, against separate stock forwards."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from mlalign.branching.attention import use
from mlalign.branching.batch import PrefixBatch
from mlalign.branching.layout import LayoutError, attention_mask
from mlalign.branching.logps import completion_logps
from mlalign.branching.split import choose
from mlalign.generate import Decoding, Request, generate
from mlalign.models._vlm import VLM
from mlalign.models.gemma3 import Gemma3
from mlalign.models.loading import load_vlm_from
from mlalign.records import ImageRef
from tests.models import exact
from tests.models.test_idefics3 import (
    adapted,
    alone_logps,
    assert_bfloat16_is_no_worse,
    messages,
    png,
    stock_greedy,
    word_tokenizer,
)

SIDE, PATCH, TOKENS, WINDOW = 32, 4, 16, 9
"""Image of 8 x 8 patches pooled to 4 x 4 tokens, more than the window holds."""
SIZES = ((96, 96), (160, 60))
SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def build(folder: Path, **text: Any) -> Path:
    """An untrained model with its processor; log-probs vary over nats."""
    tokenizer = word_tokenizer(
        SPECIAL,
        ("user model",),
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    ids = {name: tokenizer.get_vocab()[name] for name in SPECIAL}
    config = Gemma3Config(
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
            "patch_size": PATCH, "vision_use_head": False,
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 12, "query_pre_attn_scalar": 12, "max_position_embeddings": 256,
            "sliding_window": WINDOW, "pad_token_id": ids["<pad>"], "bos_token_id": ids["<bos>"],
            "eos_token_id": ids["<eos>"],
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **text,
        },
        mm_tokens_per_image=TOKENS,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.15)
            elif ".post_" in name:
                # Or the tied head would only repeat the last token.
                parameter.data.fill_(2.0)
    model.generation_config.eos_token_id = [ids["<eos>"], ids["<end_of_turn>"]]
    model.save_pretrained(folder)
    image_processor = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    Gemma3Processor(
        image_processor, tokenizer, chat_template=TEMPLATE, image_seq_length=TOKENS
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("gemma3"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["dense", "auto"])
def test_branches_are_exact(folder: Path, attention: str, packed: bool) -> None:
    vlm = exact.with_adapter(load_vlm_from(folder, dtype="float32"))
    exact.assert_exact(vlm, exact.case(vlm, SIZES), attention, packed=packed)


def test_full_attention_only(tmp_path: Path) -> None:
    vlm = exact.with_adapter(
        load_vlm_from(build(tmp_path, layer_types=["full_attention"] * 3), dtype="float32")
    )
    made = exact.case(vlm, SIZES)
    assert not rows(vlm, made).windows
    exact.assert_exact(vlm, made, "dense")


def test_each_part_of_the_masks_matters(folder: Path) -> None:
    """What the equality above would not forgive: each fault alone moves log-probs."""
    vlm = adapted(folder)
    made = exact.case(vlm, SIZES)
    alone, batch = alone_logps(vlm, made), rows(vlm, made)
    assert dict(batch.windows) == {"full_attention": None, "sliding_attention": WINDOW}
    faults = {
        "none": batch,
        "causal image": replace(batch, block_RT=None),
        "window everywhere": replace(batch, windows=(("", WINDOW),)),
        "window nowhere": replace(batch, windows=(("", None),)),
        "window over the row": replace(
            batch, place_RT=torch.arange(batch.place_RT.shape[1]).expand_as(batch.place_RT)
        ),
        "siblings": replace(batch, segment_RT=batch.segment_RT.clamp(max=1)),
    }
    moved = {name: float((logps(vlm, each) - alone).abs().max()) for name, each in faults.items()}
    assert moved.pop("none") <= 1e-5
    assert min(moved.values()) > 1e-2, moved


def test_the_image_block_sees_both_ways_and_no_further(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="float32")
    batch = rows(vlm, exact.case(vlm, SIZES))
    seen_TT, near_TT = attention_mask(batch)[0, 0], attention_mask(batch, WINDOW)[0, 0]
    image = (batch.input_ids_RT[0] == vlm.image_token_id).nonzero()[:, 0]
    first, last = int(image[0]), int(image[-1])
    assert len(image) == TOKENS == last - first + 1
    assert seen_TT[first : last + 1, first : last + 1].all()
    assert not seen_TT[first : last + 1, last + 1 :].any() and not seen_TT[first - 1, first:].any()
    assert near_TT[first, last] and not near_TT[last, last - WINDOW]


def test_bfloat16(folder: Path) -> None:
    """Measured (nats, largest and mean, log-probs from -7 to -2): a stock forward alone against
    float32 0.071, 0.012; the same rows padded in one stock batch against alone 0.014, 0.0011;
    branches against alone 0.014, 0.0011; with the planted fault 1.42, 0.23.
    """
    full, half = adapted(folder), adapted(folder, "bfloat16")
    assert_bfloat16_is_no_worse(full, half, SIZES, "dense")


def test_split_attention_is_refused(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="float32")
    batch = rows(vlm, exact.case(vlm, SIZES))
    with pytest.raises(ValueError, match="sliding windows and image blocks need a mask"):
        completion_logps(vlm.model, batch, "split")
    assert choose(vlm.core, batch) == "dense"


def test_a_text_model_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    vlm = load_vlm_from(build(tmp_path, use_bidirectional_attention=True), dtype="float32")
    with pytest.raises(LayoutError, match="use_bidirectional_attention"):
        rows(vlm, exact.case(vlm, SIZES))


def test_ids_are_those_of_the_stock_processor(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="float32")
    # The stock processor's own setting wins over the image processor's.
    vlm.processor.image_processor.do_pan_and_scan = True
    for seed, size in enumerate([*SIZES, (30, 200)]):
        image = exact.picture(*size, seed)
        text = vlm.processor.apply_chat_template(
            messages("What do you see here?"), add_generation_prompt=True, tokenize=False
        )
        stock = vlm.processor(
            images=[image], text=[text], return_tensors="pt", add_special_tokens=False
        )
        prefix = vlm.prefix_ids("What do you see here?", size)
        assert prefix == stock["input_ids"][0].tolist()
        assert prefix.count(vlm.image_token_id) == TOKENS
        pixels = vlm.image(image).tensors["pixel_values"]
        torch.testing.assert_close(pixels, stock["pixel_values"], rtol=0, atol=0)
        made = vlm.family.generation(torch.tensor([prefix]), vlm.image_token_id, [])
        assert torch.equal(made["token_type_ids"], stock["token_type_ids"])


def test_crops_are_refused(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="float32")
    vlm.processor.images_kwargs = {**vlm.processor.images_kwargs, "do_pan_and_scan": True}
    with pytest.raises(ValueError, match="do_pan_and_scan"):
        vlm.image(exact.picture(96, 96, 0))


def test_a_wrong_token_count_names_the_record(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="float32")
    vlm.processor.full_image_sequence = vlm.processor.full_image_sequence.replace(
        "<image_soft_token>", "", 1
    )
    made = exact.case(vlm, SIZES)
    ids = [["a"] * 2, ["b"], ["c"] * 4]
    batch = vlm.rows(made.prefixes, made.completions, made.inputs, ids=ids)
    with pytest.raises(LayoutError, match=r"a: 15 image tokens in the prompt, but 16 features"):
        vlm.encode(batch)


def test_boxes_against_painted_pixels(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="float32")
    side = vlm.grid((1, 1))[0]
    cell = SIDE // side
    for size in [(96, 96), (200, 120), (90, 260)]:
        width, height = size
        for box in [
            (0, 0, width / 3, height / 3),
            (width * 0.4, height * 0.45, width * 0.7, height * 0.8),
        ]:
            plain = Image.new("RGB", size, (120, 120, 120))
            painted = plain.copy()
            ImageDraw.Draw(painted).rectangle(tuple(map(round, box)), fill=(250, 0, 0))
            before, after = (
                Gemma3.inputs(vlm.processor, image, "crop").tensors["pixel_values"][0]
                for image in (plain, painted)
            )
            changed = ((after - before).abs().amax(0) > 0.5).float()
            share = changed.reshape(side, cell, side, cell).mean((1, 3)).flatten()
            mask = vlm.patch_mask(box, size)
            # Resampling blurs an edge by a pixel or two: judge cells clearly in or out.
            assert mask[share > 0.3].all() and mask[share > 0.3].any()
            assert not mask[share == 0].any()


def test_greedy_text_is_the_stock_model_s(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="float32")
    vlm.model.double()
    pictures = [exact.picture(*size, seed) for size, seed in zip(SIZES, (0, 4), strict=True)]
    prompts = exact.PROMPTS[::2]
    requests = [
        Request(str(i), ImageRef(data=png(image)), prompt)
        for i, (image, prompt) in enumerate(zip(pictures, prompts, strict=True))
    ]
    ours = generate(vlm, requests, Decoding(max_new_tokens=12))
    made = vlm.processor.image_processor(images=pictures, return_tensors="pt")
    prefixes = [vlm.prefix_ids(p, i.size) for p, i in zip(prompts, pictures, strict=True)]
    assert len(set(map(len, prefixes))) == 2
    width = max(map(len, prefixes))
    kinds = [[0] * (width - len(p)) + [int(i == vlm.image_token_id) for i in p] for p in prefixes]
    pixels = made["pixel_values"].double()
    stock = stock_greedy(vlm, prefixes, 12, pixel_values=pixels, token_type_ids=torch.tensor(kinds))
    assert [text for (text,) in ours] == stock
    assert len(set(stock)) == 2 and all(re.search(r"\w", text) for text in stock)
    # The keyword of Gemma3.generation is not idle: a causal image reads otherwise.
    assert stock_greedy(vlm, prefixes, 12, pixel_values=pixels) != stock


def rows(vlm: VLM, made: exact.Case) -> PrefixBatch:
    """All groups, encoded."""
    use(vlm.core)
    return vlm.encode(vlm.rows(made.prefixes, made.completions, made.inputs))


def logps(vlm: VLM, batch: PrefixBatch) -> torch.Tensor:
    """Log-probs of all completions by the dense path."""
    use(vlm.core)
    with torch.no_grad():
        found = completion_logps(vlm.model, batch, "dense")
    return found.logps_CS[found.mask_CS]
