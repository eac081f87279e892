"""Quantised loads, full fine-tuning, a trained projector, padding with dropout: each trains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlalign import store
from mlalign.data.reader import DataError
from mlalign.models.loading import load_vlm, load_vlm_from
from mlalign.recipe import RecipeError, from_dict
from mlalign.train import launch
from mlalign.train.preference import train_arm
from tests.train.pairs import make_pairs


def _recipe(model: Path, pairs: Path, /, **sections: Any) -> Any:
    raw: dict[str, Any] = {
        "name": "variant",
        "model": {"path": str(model), "dtype": "float32", "adapter": {"rank": 4, "alpha": 16}},
        "data": {"pairs": {"arm": str(pairs)}},
        "train": {
            "objective": "dpo",
            "learning_rate": 1e-3,
            "batch_size": 4,
            "micro_batch_size": 4,
            "steps": 6,
        },
        "launch": {"launcher": "none"},
    }
    for section, keys in sections.items():
        raw[section] = {**raw[section], **keys}
    return from_dict(raw)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    store.write_preferences(tmp_path / "pairs", make_pairs(8), {})
    return tmp_path / "pairs"


def _losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_model_trains_an_adapter(
    bits: str, tiny_llava: Path, pairs: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tiny_llava, pairs, model={"quantize": bits})
    trainer = train_arm(recipe, "arm", tmp_path / "run")
    kinds = {type(m).__name__ for m in trainer.model.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits] in kinds
    tower = trainer.model.get_base_model().model.vision_tower
    assert not any("bit" in type(m).__name__ for m in tower.modules())
    losses = _losses(tmp_path / "run")
    assert losses[0] == pytest.approx(0.6931, abs=0.02) and losses[-1] < losses[0] - 0.02
    launch.forget(trainer)


def test_full_fine_tuning_against_a_frozen_copy(
    tiny_llava: Path, pairs: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tiny_llava, pairs, model={"adapter": "none"}, train={"learning_rate": 2e-4})
    before = load_vlm_from(tiny_llava, dtype="float32").core.state_dict()
    trainer = train_arm(recipe, "arm", tmp_path / "run")
    losses = _losses(tmp_path / "run")
    assert losses[0] == pytest.approx(0.693147, abs=1e-5) and losses[-1] < 0.6
    after = load_vlm_from(tmp_path / "run/arm/model", dtype="float32").core.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)
    for name, value in trainer.ref_model.state_dict().items():
        assert torch.equal(value, before[name]), name
    launch.forget(trainer)


def test_a_projector_trains_beside_lora_and_reloads(
    tiny_llava: Path, pairs: Path, tmp_path: Path
) -> None:
    adapter = {"rank": 4, "alpha": 16, "modules_to_save": ["multi_modal_projector"]}
    recipe = _recipe(tiny_llava, pairs, model={"adapter": adapter})
    trainer = train_arm(recipe, "arm", tmp_path / "run")
    assert _losses(tmp_path / "run")[0] == pytest.approx(0.693147, abs=1e-5)
    launch.forget(trainer)
    base = load_vlm_from(tiny_llava, dtype="float32")
    tuned = load_vlm(recipe.model, adapter=tmp_path / "run/arm/adapter")
    weight = base.core.model.multi_modal_projector.linear_1.weight
    module = tuned.core.model.multi_modal_projector
    assert not torch.equal(module.modules_to_save["default"].linear_1.weight, weight)
    assert torch.equal(module.original_module.linear_1.weight, weight)


def test_dropout_needs_the_padded_layout(tiny_llava: Path, pairs: Path, tmp_path: Path) -> None:
    adapter = {"rank": 4, "alpha": 16, "dropout": 0.3}
    with pytest.raises(RecipeError, match=r"needs train\.layout: padded"):
        _recipe(tiny_llava, pairs, model={"adapter": adapter})
    recipe = _recipe(tiny_llava, pairs, model={"adapter": adapter}, train={"layout": "padded"})
    trainer = train_arm(recipe, "arm", tmp_path / "run")
    assert any(m.p == 0.3 for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout))
    assert _losses(tmp_path / "run")[-1] < 0.69
    launch.forget(trainer)


def test_too_few_pairs_and_none_at_all(tiny_llava: Path, pairs: Path, tmp_path: Path) -> None:
    recipe = _recipe(tiny_llava, pairs, train={"batch_size": 12, "micro_batch_size": 12})
    with pytest.raises(DataError, match=r"8 usable pairs, fewer than train\.batch_size 12"):
        train_arm(recipe, "arm", tmp_path / "run")
    recipe = _recipe(tiny_llava, tmp_path / "gone")
    with pytest.raises(DataError, match="no pairs for 'arm'"):
        train_arm(recipe, "arm", tmp_path / "run")
    recipe = _recipe(tiny_llava, pairs, train={"max_length": 30})
    with pytest.raises(DataError, match="no completion token left after max_length"):
        train_arm(recipe, "arm", tmp_path / "run")


def test_float16_is_refused_before_the_model_loads(
    tiny_llava: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlalign.train.preference.load_vlm", lambda *_: pytest.fail("loaded"))
    recipe = _recipe(tiny_llava, pairs, model={"dtype": "float16"})
    with pytest.raises(launch.LaunchError, match=r"model\.dtype: float16 .* Train in bfloat16"):
        train_arm(recipe, "arm", tmp_path / "run")


def test_a_prompt_longer_than_the_positions_is_named(tiny_llava: Path, tmp_path: Path) -> None:
    first, second = make_pairs(2)
    long = dataclasses.replace(second, prompt="Is there a dog in the image? " * 80)
    store.write_preferences(tmp_path / "pairs", [first, long], {})
    recipe = _recipe(tiny_llava, tmp_path / "pairs", train={"batch_size": 2, "micro_batch_size": 2})
    with pytest.raises(DataError, match="no completion token left after max_length"):
        train_arm(recipe, "arm", tmp_path / "run")
    (row,) = (json.loads(line) for line in (tmp_path / "run/events.jsonl").open())
    assert second.id in row["examples"][0]
