"""The SFT stage on a small model of every family, against plain forwards over pixels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlalign.branching.logps import completion_logps
from mlalign.images import open_image
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_adapter, load_vlm_from
from mlalign.records import Dialogue
from mlalign.train.sft import SftSettings, train_sft
from mlalign.train.sft_data import SftCollator, tokenize_dialogue
from tests.models import exact
from tests.models.folders import BUILD
from tests.train.pairs import shaped_pairs


def dialogues() -> list[Dialogue]:
    """Two, on pictures of different shapes, of one and of two turns."""
    first, second = shaped_pairs(2)
    turns = (((first.prompt, "A dog."),), ((second.prompt, "No."), ("What is it?", "A table.")))
    return [
        Dialogue(
            id=pair.id, image=pair.image, image_sha256=pair.image_sha256, turns=each, source="test"
        )
        for pair, each in zip((first, second), turns, strict=True)
    ]


def train(vlm: VLM, out: Path, **settings: Any) -> tuple[Any, list[dict]]:
    """Three steps on the same batch of two; the trained model and its log."""
    chosen = {"steps": 3, "batch": 2, "learning_rate": 1e-2, "log_every": 1, "warmup": 0.0}
    chosen |= {"trainable": "lora+projector", "schedule": "constant_with_warmup"}
    made = SftSettings(**chosen | settings)
    trained = train_sft(vlm.model, vlm.processor, dialogues(), made, out)
    lines = map(json.loads, (out / "sft.jsonl").read_text().splitlines())
    return trained, [line for line in lines if "loss" in line]


@pytest.mark.parametrize("family", BUILD)
def test_an_adapter_and_the_projector_learn_and_reload(family: str, tmp_path: Path) -> None:
    folder = BUILD[family](tmp_path / "model")
    vlm = load_vlm_from(folder, dtype="float32")
    expected, ends = _stock_loss(vlm)
    # What the template writes after an answer is learned with it.
    assert len(ends) == 1
    trained, log = train(vlm, tmp_path / "run")
    assert log[0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert log[-1]["loss"] < log[0]["loss"] - 0.05
    moved = [name for name, p in trained.named_parameters() if p.requires_grad]
    core = trained.get_base_model()
    wrapped = tuple(f"{name}.modules_to_save" for name in vlm.family.projectors(core))
    assert all("lora_" in name or any(w in name for w in wrapped) for name in moved)
    assert all(any(w in name for name in moved) for w in wrapped)
    assert "forward" not in vars(core)

    trained.save_pretrained(tmp_path / "adapter")
    fresh = load_vlm_from(folder, dtype="float32")
    again = dataclasses.replace(fresh, model=load_adapter(fresh.model, tmp_path / "adapter"))
    found = []
    for each in (dataclasses.replace(vlm, model=trained), again):
        each.model.eval()
        with torch.no_grad():
            batch = each.encode(SftCollator(each)(dialogues())["batch"])
            found.append(completion_logps(each.model, batch, "dense").logps_CS)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


def _stock_loss(vlm: VLM) -> tuple[float, set[str]]:
    """Mean over the answers' tokens of all dialogues by stock forwards, and what stands in the
    supervised text behind each answer."""
    losses, ends = [], set()
    for dialogue in dialogues():
        ids, supervised = tokenize_dialogue(vlm, dialogue)
        image = open_image(dialogue.image, dialogue.id)
        with torch.no_grad():
            whole = exact.stock_logps(vlm, ids[:1], ids[1:], image)[:-1]
        logps = whole.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        losses.append(-logps[torch.tensor(supervised[1:])])
        kept = [i for i, s in zip(ids, supervised, strict=True) if s]
        text = vlm.tokenizer.decode(kept)
        for _, answer in dialogue.turns:
            before, found, text = text.partition(answer)
            assert found, (answer, before)
            if before.strip():
                ends.add(before.strip())
        ends.add(text.strip())
    return float(torch.cat(losses).mean()), ends


@pytest.mark.parametrize("family", ["idefics3", "internvl", "gemma3"])
def test_kept_features_give_the_same_losses(family: str, tmp_path: Path) -> None:
    """To bfloat16's precision, in which they are kept."""
    folder = BUILD[family](tmp_path / "model")
    logs = [
        train(
            load_vlm_from(folder, dtype="float32"),
            tmp_path / str(cache),
            learning_rate=1e-3,
            cache_features=cache,
        )[1]
        for cache in (False, True)
    ]
    for plain, kept in zip(*logs, strict=True):
        assert plain["loss"] == pytest.approx(kept["loss"], abs=0.05)
        assert plain["loss"] != kept["loss"]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next"])
def test_features_that_cannot_be_kept_are_refused(family: str, tmp_path: Path) -> None:
    vlm = load_vlm_from(BUILD[family](tmp_path / "model"), dtype="float32")
    with pytest.raises(ValueError, match=rf"cache_features: {vlm.family.__name__}.*Set it to fal"):
        train(vlm, tmp_path / "run", cache_features=True)


def test_everything_trains_the_tower_too(tmp_path: Path) -> None:
    vlm = load_vlm_from(BUILD["qwen3_vl"](tmp_path / "model"), dtype="float32")
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    trained, log = train(vlm, tmp_path / "run", trainable="all", learning_rate=1e-3)
    after = trained.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert not still and log[-1]["loss"] < log[0]["loss"]


def test_bfloat16_leaves_the_rotary_frequencies_alone(tmp_path: Path) -> None:
    vlm = load_vlm_from(BUILD["qwen2_5_vl"](tmp_path / "model"), dtype="float32")
    trained, log = train(vlm, tmp_path / "run", dtype="bfloat16")
    frozen = [
        p
        for n, p in trained.named_parameters()
        if not p.requires_grad and "original_module" not in n
    ]
    kinds = {p.dtype for p in frozen}
    assert kinds == {torch.bfloat16} and log[-1]["loss"] < log[0]["loss"]
    assert all(p.dtype == torch.float32 for p in trained.parameters() if p.requires_grad)
    assert {buffer.dtype for buffer in trained.buffers()} == {torch.float32}
