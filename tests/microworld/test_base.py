"""The shipped base: it loads with stock classes, is small, sees well, and has the prior."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mlalign.images import open_image
from mlalign.microworld import language, scenes, world
from mlalign.microworld.check_base import check_captions
from mlalign.microworld.model import IMAGE_TOKENS, base_folder, new_model, new_processor
from mlalign.microworld.train_base import load_recipe
from mlalign.records import Example
from mlalign.train.sft import SftSettings


@pytest.fixture(scope="module")
def shipped() -> tuple:
    model = LlavaForConditionalGeneration.from_pretrained(base_folder(), dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(base_folder())


def test_base_is_small_and_its_processor_is_the_stock_one(shipped: tuple) -> None:
    model, processor = shipped
    assert (base_folder() / "model.safetensors").stat().st_size <= 10_000_000
    assert type(processor).__name__ == "LlavaProcessor"
    assert processor.tokenizer.get_vocab() == new_processor().tokenizer.get_vocab()
    example = world.example("heldout", 0)
    image = _image(example)
    text = processor.apply_chat_template(_ask(example.prompt), add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == IMAGE_TOKENS
    assert model(**inputs).logits.isfinite().all()


def test_base_sees_well_and_hallucinates_what_is_typical(shipped: tuple) -> None:
    torch.manual_seed(0)
    figures = check_captions(*shipped, count=60, batch=60)
    assert figures["recall"] >= 0.85
    assert figures["color_right"] >= 0.85
    assert 0.1 <= figures["chair_s"] <= 0.65
    assert figures["false_typical"] >= 0.8
    assert figures["clean_grammar"] >= 0.95


def test_text_comes_back_as_it_was_and_every_word_is_known() -> None:
    tokenizer = new_processor().tokenizer
    for i in range(300):
        for question, answer in world.dialogue("train", i).turns:
            for text in (question, answer):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text
    for style in range(language.N_STYLES):
        scene = scenes.make_scene("train", 0)
        text = language.caption(scene.kind, language.true_mentions(scene), style)
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_untrained_model_depends_on_the_seed_alone() -> None:
    one, same, other = (new_model(seed).state_dict() for seed in (0, 0, 1))
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


def test_recipe_is_valid() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/microworld/base.yaml")
    SftSettings.model_validate(recipe.sft)


def _image(example: Example) -> Image.Image:

    return open_image(example.image, example.id)


def _ask(prompt: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
