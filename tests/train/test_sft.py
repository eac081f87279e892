"""The SFT stage: which tokens carry loss, what is trained, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlalign.images import open_image
from mlalign.microworld import world
from mlalign.microworld.model import IMAGE_TOKENS, new_model, new_processor
from mlalign.microworld.train_base import SceneDialogues
from mlalign.models._vlm import VLM
from mlalign.models.llava import Llava
from mlalign.records import Dialogue, RecordError
from mlalign.train.sft import SftSettings, train_sft
from mlalign.train.sft_data import SftCollator, tokenize_dialogue


@pytest.fixture(scope="module")
def processor() -> Any:
    return new_processor()


@pytest.fixture(scope="module")
def vlm(processor: Any) -> VLM:
    """Not to be trained."""
    return VLM(new_model(), processor, Llava)


def _dialogue(*turns: tuple[str, str]) -> Dialogue:
    base = world.dialogue("train", 0)
    return Dialogue(
        id="two", image=base.image, image_sha256=base.image_sha256, turns=turns, source="test"
    )


TWO_TURNS = _dialogue(("Is there a dog in the image?", "Yes."), ("What color is the dog?", "Red."))


def test_only_the_answers_and_their_ends_carry_loss(vlm: VLM) -> None:
    ids, supervised = tokenize_dialogue(vlm, TWO_TURNS)
    tokens = vlm.tokenizer.convert_ids_to_tokens(ids)
    assert [t for t, s in zip(tokens, supervised, strict=True) if s] == [
        "▁Yes", ".", "</s>", "▁Red", ".", "</s>",
    ]  # fmt: skip
    batch = SftCollator(vlm)([TWO_TURNS, _dialogue(("Is this a park?", "No."))])["batch"]
    assert (batch.input_ids_RT == vlm.image_token_id).sum(1).tolist() == [IMAGE_TOKENS] * 2
    for row, wanted in enumerate(
        (["▁Yes", ".", "</s>", "▁Red", ".", "</s>"], ["▁No", ".", "</s>"])
    ):
        kept = batch.mask_CS[row]
        assert vlm.tokenizer.convert_ids_to_tokens(batch.target_CS[row][kept].tolist()) == wanted
        # Each is predicted from the place before its own.
        after = batch.input_ids_RT[row][batch.source_CS[row][kept] + 1]
        assert torch.equal(after, batch.target_CS[row][kept])
    assert len(batch.images["pixel_values"]) == 1 and batch.image_G == (0, 0)


def test_tokens_are_those_of_the_stock_processor(vlm: VLM) -> None:
    dialogue = _dialogue(("Is there a dog in the image?", "Yes."))
    content = [{"type": "image"}, {"type": "text", "text": dialogue.turns[0][0]}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    text = vlm.processor.apply_chat_template(messages)
    image = open_image(dialogue.image, dialogue.id)
    stock = vlm.processor(text=[text], images=[image], return_tensors="pt")
    ours = SftCollator(vlm)([dialogue])["batch"]
    assert torch.equal(stock["input_ids"], ours.input_ids_RT)
    assert torch.equal(stock["pixel_values"], ours.images["pixel_values"])


def test_a_dialogue_that_cannot_be_used_is_an_error(vlm: VLM) -> None:
    with pytest.raises(RecordError, match="max_length 40"):
        SftCollator(vlm, max_length=40)([TWO_TURNS])
    blind = VLM(vlm.model, new_processor(), Llava)
    blind.processor.chat_template = blind.processor.chat_template.replace("<image>", "")
    with pytest.raises(RecordError, match=r"'two'.*0 image tokens .* its image takes 36"):
        SftCollator(blind)([TWO_TURNS])
    last = VLM(vlm.model, new_processor(), Llava)
    noted = "{% if messages | length > 2 %}<|system|>{% endif %}"
    last.processor.chat_template = noted + last.processor.chat_template
    with pytest.raises(RecordError, match="changes earlier turns at turn 2"):
        SftCollator(last)([TWO_TURNS])


def test_settings_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="exactly one of steps and epochs"):
        SftSettings()
    with pytest.raises(ValueError, match="tower is trained"):
        SftSettings(steps=1, cache_features=True)
    with pytest.raises(ValueError, match="learning_rat"):
        SftSettings(steps=1, learning_rat=1)  # type: ignore[call-arg]


def _train(out: Path, processor: Any, **settings: Any) -> tuple[Any, list[dict], dict]:
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = SftSettings(
        **{"steps": 12, "batch": 4, "learning_rate": 1e-3, "warmup": 0.3, "log_every": 1} | settings
    )
    trained = train_sft(model, processor, SceneDialogues("train", 16), chosen, out)
    lines = [json.loads(line) for line in (out / "sft.jsonl").read_text().splitlines()]
    return trained, [line for line in lines if "loss" in line], before


def test_loss_falls_and_everything_moves(tmp_path: Path, processor: Any) -> None:
    model, log, before = _train(tmp_path, processor)
    assert log[-1]["loss"] < log[0]["loss"] - 1.0
    assert {"mean_token_accuracy", "grad_norm", "learning_rate"} <= set(log[0])
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert any("vision_tower" in n for n in moved) and any("language_model" in n for n in moved)
    assert "forward" not in vars(model)


def test_same_seed_same_weights(tmp_path: Path, processor: Any) -> None:
    one, _, _ = _train(tmp_path / "a", processor, steps=3)
    two, _, _ = _train(tmp_path / "b", processor, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("cache", [pytest.param(False, marks=pytest.mark.long), True])
def test_projector_alone_with_and_without_kept_features(
    tmp_path: Path, processor: Any, cache: bool
) -> None:
    model, log, before = _train(tmp_path, processor, trainable="projector", cache_features=cache)
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert moved and all("multi_modal_projector" in n for n in moved)
    assert log[-1]["loss"] < log[0]["loss"]


def test_kept_features_give_the_same_loss(tmp_path: Path, processor: Any) -> None:
    """To bfloat16's precision, in which they are kept."""
    runs = [
        _train(tmp_path / str(c), processor, trainable="projector", cache_features=c, steps=6)[1]
        for c in (False, True)
    ]
    for plain, kept in zip(*runs, strict=True):
        assert plain["loss"] == pytest.approx(kept["loss"], abs=2e-3)


def test_adapter_sits_in_the_language_model_only(tmp_path: Path, processor: Any) -> None:
    model, log, _ = _train(
        tmp_path,
        processor,
        trainable="lora+projector",
        dtype="bfloat16",
        cache_features=True,
        steps=4,
    )
    adapted = {n for n, p in model.named_parameters() if "lora_" in n}
    assert len(adapted) == 4 * 7 * 2 and not any("vision_tower" in n for n in adapted)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "multi_modal_projector.modules_to_save" in n for n in trained)
    assert log[-1]["loss"] < log[0]["loss"] and "forward" not in vars(model.get_base_model())
