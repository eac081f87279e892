"""Idefics3 and SmolVLM: tiles, their text, and rows of branches against separate stock forwards."""

from __future__ import annotations

import io
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from mlalign.branching.attention import use
from mlalign.branching.layout import LayoutError
from mlalign.branching.logps import completion_logps
from mlalign.generate import Decoding, Request, generate
from mlalign.models._processor import Parts
from mlalign.models._vlm import VLM
from mlalign.models.idefics3 import Idefics3, tiling
from mlalign.models.loading import load_vlm_from
from mlalign.records import ImageRef
from tests.models import exact

TILE, PATCH, SCALE = 16, 4, 2
TOKENS = (TILE // PATCH // SCALE) ** 2
SIZES = ((96, 96), (160, 60))
"""Nine tiles and the whole; three tiles by two and the whole."""
SPECIAL = (
    "<pad>",
    "<unk>",
    "<|begin_of_text|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)),
)
TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CLASSES: dict[str, tuple[type, type, type]] = {
    "idefics3": (
        Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil,
    ),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil),
}  # fmt: skip


def word_tokenizer(
    special: tuple[str, ...], words: tuple[str, ...], **marks: Any
) -> PreTrainedTokenizerFast:
    """Words with the blank before them, runs of line ends whole, as byte-level BPE would have."""
    split = Regex(r"\n+| ?[A-Za-z]+| |[^A-Za-z\s]")
    texts = [*exact.PROMPTS, *(text for group in exact.ANSWERS for text in group), *words]
    found = {piece for text in texts for piece in re.findall(r"[A-Za-z]+|[^A-Za-z\s]", text)}
    pieces = [*sorted({blank + piece for piece in found for blank in ("", " ")}), " ", "\n", "\n\n"]
    ids = {token: i for i, token in enumerate(dict.fromkeys([*special, *pieces]))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(split, behavior="isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **marks
    )
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def build(folder: Path, kind: str, **settings: Any) -> Path:
    """An untrained model of the family with its processor; log-probs vary over nats."""
    config_class, model_class, image_class = CLASSES[kind]
    tokenizer = word_tokenizer(
        SPECIAL,
        ("User: Assistant:",),
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|begin_of_text|>",
        eos_token="<end_of_utterance>",
    )
    image_processor = image_class(
        size={"longest_edge": 40}, max_image_size={"longest_edge": TILE}, **settings
    )
    if kind == "idefics3":
        processor: Any = Idefics3Processor(
            image_processor, tokenizer, image_seq_len=TOKENS, chat_template=TEMPLATE
        )
    else:
        processor = Parts(
            image_processor,
            tokenizer,
            {
                "image_seq_len": TOKENS,
                "chat_template": TEMPLATE,
                "processor_class": "SmolVLMProcessor",
            },
        )  # fmt: skip
    marks = {
        key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    config = config_class(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": TILE, "patch_size": PATCH,
        },
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, **marks,
        ),
        scale_factor=SCALE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.15)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(CLASSES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp(request.param), request.param)


def adapted(folder: Path, dtype: str = "float32") -> VLM:
    """Loaded as a recipe loads it, with a LoRA adapter on the family's targets that is not zero."""
    return exact.with_adapter(load_vlm_from(folder, dtype=dtype), getattr(torch, dtype))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["dense", "split"])
def test_branches_are_exact(folder: Path, attention: str, packed: bool) -> None:
    vlm = adapted(folder)
    made = exact.case(vlm, SIZES)
    images = [sum(i == vlm.image_token_id for i in prefix) for prefix in made.prefixes]
    assert images == [10 * TOKENS, 7 * TOKENS, 10 * TOKENS]
    exact.assert_exact(vlm, made, attention, packed=packed)


def rows_logps(vlm: VLM, made: exact.Case, attention: str, fault: bool = False) -> torch.Tensor:
    """Log-probs of all completions, laid out as branches. ``fault``: siblings see each other."""
    use(vlm.core)
    batch = vlm.encode(vlm.rows(made.prefixes, made.completions, made.inputs))
    if fault:
        batch = replace(batch, segment_RT=batch.segment_RT.clamp(max=1))
    with torch.no_grad():
        found = completion_logps(vlm.model, batch, attention)
    return found.logps_CS[found.mask_CS]


def alone_logps(vlm: VLM, made: exact.Case) -> torch.Tensor:
    """The same of separate stock forwards."""
    found = []
    with torch.no_grad():
        for prefix, branches, image in zip(
            made.prefixes, made.completions, made.images, strict=True
        ):
            for branch in branches:
                whole = exact.stock_logps(vlm, prefix, branch, image)[len(prefix) - 1 : -1]
                found.append(whole.gather(1, torch.tensor(branch)[:, None])[:, 0])
    return torch.cat(found)


def assert_bfloat16_is_no_worse(
    full: VLM, half: VLM, sizes: tuple[tuple[int, int], ...], attention: str
) -> None:
    """Branching moves bfloat16 log-probs by no more than bfloat16 itself does, and siblings that
    see each other would be noticed."""
    made = exact.case(half, sizes)
    alone = alone_logps(half, made)
    rounding = (alone - alone_logps(full, made)).abs()
    moved = (rows_logps(half, made, attention) - alone).abs()
    assert rounding.max() > 0
    assert moved.max() <= rounding.max() and moved.mean() <= rounding.mean() / 2
    planted = (rows_logps(half, made, "dense", fault=True) - alone).abs()
    assert planted.max() > rounding.max() and planted.mean() > rounding.mean()


@pytest.mark.parametrize("attention", ["dense", "split"])
def test_bfloat16(folder: Path, attention: str) -> None:
    """Measured (nats, largest and mean, log-probs from -7 to -2): a stock forward alone against
    float32 0.092, 0.019; the same rows padded in one stock batch against alone 0.014, 0.0006;
    branches against alone 0.014, 0.0006 dense and 5e-7 split; with the planted fault 0.73, 0.14.
    """
    full, half = adapted(folder), adapted(folder, "bfloat16")
    assert_bfloat16_is_no_worse(full, half, SIZES, attention)


@pytest.mark.parametrize("attention", ["dense", "split"])
def test_an_image_that_is_not_split(tmp_path: Path, attention: str) -> None:
    vlm = adapted(build(tmp_path, "idefics3", do_image_splitting=False))
    made = exact.case(vlm, SIZES)
    assert made.prefixes[0].count(vlm.image_token_id) == TOKENS
    assert vlm.grid((96, 96)) == vlm.grid((160, 60)) == (2, 2)
    exact.assert_exact(vlm, made, attention)


@pytest.mark.parametrize("splitting", [True, False])
def test_ids_are_those_of_the_stock_processor(tmp_path: Path, splitting: bool) -> None:
    vlm = load_vlm_from(build(tmp_path, "idefics3", do_image_splitting=splitting), dtype="float32")
    for seed, size in enumerate([*SIZES, (30, 200), (10, 7), (40, 40)]):
        image = exact.picture(*size, seed)
        text = vlm.processor.apply_chat_template(
            messages("What do you see here?"), add_generation_prompt=True, tokenize=False
        )
        stock = vlm.processor(
            images=[image], text=[text], return_tensors="pt", add_special_tokens=False
        )
        assert vlm.prefix_ids("What do you see here?", size) == stock["input_ids"][0].tolist()
        ours = vlm.image(image).tensors
        torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"], rtol=0, atol=0)


def test_smolvlm_text_is_the_stock_rule(tmp_path: Path) -> None:
    """The whole stock processor needs packages for video; its rule for images stands apart."""
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    vlm = load_vlm_from(build(tmp_path, "smolvlm"), dtype="float32")
    for seed, size in enumerate([*SIZES, (30, 200), (10, 7), (40, 40)]):
        made = vlm.processor.image_processor(
            images=exact.picture(*size, seed), return_tensors="pt", return_row_col_info=True
        )
        wanted = get_image_prompt_string(
            made["rows"][0][0], made["cols"][0][0], TOKENS,
            "<fake_token_around_image>", "<image>", "<global-img>",
        )  # fmt: skip
        assert vlm.family.image_text(vlm.processor, size) == wanted
        text = vlm.processor.apply_chat_template(messages("Is there a dog in the image?"))
        ids = vlm.tokenizer(text.replace("<image>", wanted), add_special_tokens=False)["input_ids"]
        assert vlm.prefix_ids("Is there a dog in the image?", size)[: len(ids)] == ids


@pytest.mark.parametrize("longest", [16, 40, 64])
def test_tiling_is_the_image_processor_s(longest: int) -> None:
    """Also where ``get_number_of_image_patches`` of the image processor rounds otherwise."""
    processor: Any = Idefics3ImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": TILE}
    )
    draw, differs = random.Random(0), 0
    for _ in range(150):
        size = (draw.randint(1, 90), draw.randint(1, 90))
        made = processor(
            images=Image.new("RGB", size), return_tensors="pt", return_row_col_info=True
        )
        cut = tiling(processor, size)
        assert (cut.rows, cut.columns) == (made["rows"][0][0], made["cols"][0][0]), size
        assert made["pixel_values"].shape[1] == cut.rows * cut.columns + 1
        differs += processor.get_number_of_image_patches(*size[::-1])[1:] != cut[:2]
    assert longest != 40 or differs


def test_a_blank_image_keeps_its_tiles(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="bfloat16")
    image = vlm.image(exact.picture(96, 96, 0))
    blank = vlm.blank(image)
    assert blank.tensors["pixel_values"].abs().max() < 0.5 / 127.5  # half a grey level
    (found,) = vlm.features([blank]).pooler_output
    assert len(found) == 10 * TOKENS and torch.isfinite(found).all()
    # What the trace is there to avoid: the model drops tiles of zeros.
    pixels = blank.tensors["pixel_values"].clone()
    pixels[:, :-1] = 0
    (lost,) = vlm.features([replace(blank, tensors={"pixel_values": pixels})]).pooler_output
    assert len(lost) == TOKENS


def test_images_of_unequal_tiles_in_one_call(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="float32")
    images = [vlm.image(exact.picture(*size, seed)) for seed, size in enumerate(SIZES)]
    together = vlm.features([images[1], images[0], images[1]]).pooler_output
    assert [len(each) for each in together] == [7 * TOKENS, 10 * TOKENS, 7 * TOKENS]
    for found, image in zip(together, [images[1], images[0], images[1]], strict=True):
        (alone,) = vlm.features([image]).pooler_output
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


def test_a_wrong_token_count_names_the_record(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="float32")
    made = exact.case(vlm, SIZES)
    ids = [
        [f"{name}-{i}" for i in range(len(c))]
        for name, c in zip("abc", made.completions, strict=True)
    ]
    # The prompt of the first image with the pixels of the second.
    inputs = [made.inputs[0], made.inputs[1], made.inputs[1]]
    batch = vlm.rows(made.prefixes, made.completions, inputs, ids=ids)
    with pytest.raises(LayoutError, match=r"c-0: 40 image tokens in the prompt, but 28 features"):
        vlm.encode(batch)


def test_boxes_against_painted_pixels() -> None:
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 128}, max_image_size={"longest_edge": 32}
    )
    processor = SimpleNamespace(image_processor=image_processor, image_seq_len=16)
    family, cell = Idefics3, 8
    for size in [(128, 128), (200, 120), (90, 260)]:
        width, height = size
        for box in [
            (0, 0, width / 3, height / 3),
            (width * 0.4, height * 0.45, width * 0.7, height * 0.8),
        ]:
            plain = Image.new("RGB", size, (120, 120, 120))
            painted = plain.copy()
            ImageDraw.Draw(painted).rectangle(tuple(map(round, box)), fill=(250, 0, 0))
            before, after = (
                family.inputs(processor, image, "crop").tensors["pixel_values"][0]
                for image in (plain, painted)
            )
            changed = ((after - before).abs().amax(1) > 0.5).float()
            share = changed.reshape(-1, 4, cell, 4, cell).mean((2, 4)).flatten()
            mask = family.patch_mask(processor, box, size, "crop")
            assert mask.shape == share.shape
            # Resampling blurs an edge by a pixel or two: judge cells clearly in or out.
            assert mask[share > 0.3].all() and mask[share > 0.3].any()
            assert share[mask].mean() > 0.4 and (share[~mask] == 0).float().mean() > 0.9
        with pytest.raises(NotImplementedError, match=r"no single grid"):
            family.grid(processor, size)


def test_lora_hits_every_linear_of_the_text_model_and_nothing_else(folder: Path) -> None:
    weights = [name for name, _ in adapted(folder).model.named_parameters()]
    names = [name.partition(".lora_A")[0] for name in weights if ".lora_A." in name]
    assert len(names) == 7 * 3 and all(".text_model.layers." in name for name in names)


def test_greedy_text_is_the_stock_model_s(folder: Path) -> None:
    vlm = load_vlm_from(folder, dtype="float32")
    vlm.model.double()
    pictures = [exact.picture(*size, seed) for seed, size in enumerate(SIZES)]
    requests = [
        Request(str(i), ImageRef(data=png(image)), prompt)
        for i, (image, prompt) in enumerate(zip(pictures, exact.PROMPTS[:2], strict=True))
    ]
    ours = generate(vlm, requests, Decoding(max_new_tokens=8))
    made = vlm.processor.image_processor(images=[[p] for p in pictures], return_tensors="pt")
    prefixes = [vlm.prefix_ids(r.prompt, p.size) for r, p in zip(requests, pictures, strict=True)]
    assert len(set(map(len, prefixes))) == 2
    stock = stock_greedy(vlm, prefixes, 8, pixel_values=made["pixel_values"].double(),
                         pixel_attention_mask=made["pixel_attention_mask"])  # fmt: skip
    assert [text for (text,) in ours] == stock
    assert len(set(stock)) == 2 and all(stock)


def stock_greedy(vlm: VLM, prefixes: list[list[int]], tokens: int, **inputs: Any) -> list[str]:
    """Texts of the stock model's own ``generate`` on pixels, rows padded on the left."""
    width = max(map(len, prefixes))
    vlm.core.set_attn_implementation({"text_config": "sdpa"})
    out = vlm.model.generate(
        input_ids=torch.tensor([[vlm.pad_id] * (width - len(p)) + p for p in prefixes]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prefixes]),
        max_new_tokens=tokens,
        do_sample=False,
        **inputs,
    )
    texts = vlm.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def messages(prompt: str) -> list[dict[str, Any]]:
    """One turn of a user with an image."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def png(image: Image.Image) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
