"""The LLaVA family: geometry against painted pixels, template ids, LoRA targets, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoProcessor, CLIPImageProcessor

from mlalign.images import open_image
from mlalign.microworld import world
from mlalign.models import loading
from mlalign.models.llava import METHOD as Llava
from mlalign.models.llava import pad_to_square
from mlalign.models.loading import ModelError, load_adapter, load_vlm_from, lora_config
from mlalign.sections import LoraSection


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [(96, 96), (200, 120), (90, 260)])
def test_patch_mask_against_painted_pixels(
    tiny_llava: Path, mode: str, size: tuple[int, int]
) -> None:
    processor = AutoProcessor.from_pretrained(tiny_llava, backend="pil")
    processor.image_processor = _clip_like(processor)
    width, height = size
    for box in [
        (0, 0, width / 3, height / 3),
        (width * 0.4, height * 0.45, width * 0.7, height * 0.8),
    ]:
        plain = Image.new("RGB", size, (120, 120, 120))
        painted = plain.copy()
        ImageDraw.Draw(painted).rectangle(tuple(map(round, box)), fill=(250, 0, 0))
        changed = (
            Llava.inputs(processor, painted, mode).tensors["pixel_values"][0]
            - Llava.inputs(processor, plain, mode).tensors["pixel_values"][0]
        ).abs().amax(0) > 0.5
        rows, columns = Llava.grid(processor, (96, 96))
        patch = processor.patch_size
        share = changed.float().reshape(rows, patch, columns, patch).mean((1, 3)).flatten()
        mask = Llava.patch_mask(processor, box, size, mode)
        # Resampling blurs an edge by a pixel or two: judge patches clearly in or out.
        assert mask[share > 0.3].all() and not mask[share == 0].any()


def test_a_box_outside_the_crop_touches_nothing(tiny_llava: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_llava, backend="pil")
    processor.image_processor = _clip_like(processor)
    assert not Llava.patch_mask(processor, (0, 0, 20, 96), (300, 96), "crop").any()
    assert Llava.patch_mask(processor, (0, 0, 20, 96), (300, 96), "pad").any()


def test_padding_centres_the_image() -> None:
    square = pad_to_square(Image.new("RGB", (40, 20), (255, 0, 0)), (1, 2, 3))
    assert square.size == (40, 40)
    assert square.getpixel((20, 5)) == (1, 2, 3) and square.getpixel((20, 20)) == (255, 0, 0)


def test_ids_are_those_of_the_stock_processor(tiny_llava: Path) -> None:
    vlm = load_vlm_from(tiny_llava, dtype="float32")
    example = world.example("pairs", 0)
    image = open_image(example.image, example.id)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.prompt}]}
    ]
    text = vlm.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    stock = vlm.processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
    assert vlm.prefix_ids(example.prompt, (96, 96)) == stock["input_ids"][0].tolist()
    torch.testing.assert_close(
        vlm.image(image).tensors["pixel_values"][0], stock["pixel_values"][0]
    )
    count = sum(i == vlm.image_token_id for i in vlm.prefix_ids(example.prompt, (96, 96)))
    assert count == math.prod(vlm.grid((96, 96)))


def test_branches_continue_the_prompt(tiny_llava: Path) -> None:
    vlm = load_vlm_from(tiny_llava, dtype="float32")
    prefix, (short, long) = vlm.branch_ids(
        "Describe the image.", ["A red kettle.", "A red kettle and a blue boat."], (96, 96)
    )
    assert prefix == vlm.prefix_ids("Describe the image.", (96, 96))
    assert vlm.tokenizer.decode(short, skip_special_tokens=True).strip().lower() == "a red kettle."
    assert short[-1] == vlm.tokenizer.eos_token_id and len(long) > len(short)


def test_lora_hits_every_linear_of_the_blocks_and_nothing_else(tiny_llava: Path) -> None:
    vlm = load_vlm_from(tiny_llava, dtype="float32")
    from peft import get_peft_model

    adapted = {
        name.partition(".lora_A")[0]
        for name, _ in get_peft_model(vlm.model, lora_config(LoraSection(), vlm)).named_parameters()
        if ".lora_A." in name
    }
    assert len(adapted) == 7 * len(vlm.layers)
    assert all("language_model.layers." in name for name in adapted)


def test_targets_that_leave_the_language_model_are_refused(tiny_llava: Path) -> None:
    vlm = load_vlm_from(tiny_llava, dtype="float32")
    with pytest.raises(ModelError, match=r"vision_tower.*outside the language model"):
        lora_config(LoraSection(targets=r".*(q_proj|v_proj)"), vlm)
    with pytest.raises(ModelError, match="matches no linear"):
        lora_config(LoraSection(targets="nothing"), vlm)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_head_is_not_trained_in_full(name: str, tiny_llava: Path) -> None:
    vlm = load_vlm_from(tiny_llava, dtype="float32")
    section = LoraSection(modules_to_save=("multi_modal_projector", name))
    with pytest.raises(ModelError, match=rf"modules_to_save: {name} is tied .* Untie the model"):
        lora_config(section, vlm)
    vlm.core.config.tie_word_embeddings = False
    assert lora_config(section, vlm).modules_to_save == ["multi_modal_projector", name]


def test_missing_folder_unknown_family_and_foreign_adapter(
    tiny_llava: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"model\.path: the folder /no/such does not exist"):
        load_vlm_from("/no/such")
    with pytest.raises(ModelError, match="no built-in model 'nothing'"):
        load_vlm_from("builtin:nothing")
    other = type("Config", (), {"architectures": ["MambaForCausalLM"]})()
    with pytest.raises(ModelError, match=r"serves MambaForCausalLM.*LlavaForConditionalGeneration"):
        loading.family_of(other)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        load_adapter(None, tmp_path)


def test_an_adapter_that_does_not_fit_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    from peft import get_peft_model
    from safetensors.torch import load_file, save_file

    vlm = load_vlm_from(tiny_llava, dtype="float32")
    get_peft_model(vlm.model, lora_config(LoraSection(rank=2), vlm)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    gone = weights.pop(sorted(weights)[0])
    save_file({**weights, "base_model.model.nowhere.lora_A.weight": gone}, file)
    with pytest.raises(
        ModelError, match=r"of its weights are 1 missing .*and 1 without a place .*nowhere"
    ):
        load_adapter(load_vlm_from(tiny_llava, dtype="float32").model, tmp_path)


def _clip_like(processor: object) -> object:
    """CLIP's geometry at the small model's size: shortest edge, then a centre crop."""
    edge = Llava.grid(processor, (96, 96))[0] * processor.patch_size  # type: ignore[attr-defined]
    return CLIPImageProcessor.from_dict(
        {
            "do_resize": True,
            "size": {"shortest_edge": edge},
            "do_center_crop": True,
            "crop_size": {"height": edge, "width": edge},
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.25, 0.25, 0.25],
        }
    )
