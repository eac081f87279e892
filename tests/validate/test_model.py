"""What trains, read off a model without weights, against the model with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlalign.data.collate import tokenise
from mlalign.models.loading import load_vlm, lora_config
from mlalign.sections import LoraSection, ModelSection
from mlalign.validate.adapter import adapter_faults, groups, totals
from mlalign.validate.model import empty_vlm
from mlalign.validate.sample import sample_of
from tests.models import qwen
from tests.train.pairs import make_pairs


def section(path: Path | str = "builtin:microworld", **keys: Any) -> ModelSection:
    return ModelSection(path=str(path), dtype="float32", **keys)


def empty(model: ModelSection) -> Any:
    vlm, findings = empty_vlm(model, "recipe")
    assert vlm is not None and not findings
    return vlm


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"rank": 4, "targets": r".*language_model\.layers\.[12]\..*(q|v)_proj"},
        {"rank": 2, "modules_to_save": ("multi_modal_projector",)},
    ],
)
def test_counts_are_those_of_the_model_that_trains(lora: dict[str, Any]) -> None:
    from peft import get_peft_model

    model = section(adapter=LoraSection(**lora))
    whole = load_vlm(model)
    before = sum(p.numel() for p in whole.core.parameters())
    tuned: Any = get_peft_model(whole.core, lora_config(LoraSection(**lora), whole))
    trained, _ = tuned.get_nb_trainable_parameters()
    wrapped = sum(hasattr(m, "lora_A") for m in tuned.modules())
    total = totals(groups(model, empty(model), faulty=False))
    assert (total.trained, total.wrapped, total.total) == (trained, wrapped, before)


def test_full_fine_tuning_leaves_the_tower() -> None:
    model = section(adapter="none")
    whole = load_vlm(model).core
    tower = sum(p.numel() for p in whole.model.vision_tower.parameters())
    table = {group.name: group for group in groups(model, empty(model), faulty=False)}
    assert table["vision_tower"].trained == 0 and table["vision_tower"].total == tower
    rest = sum(p.numel() for p in whole.parameters()) - tower
    assert totals(list(table.values())).trained == rest


def test_targets_that_leave_the_language_model_are_named() -> None:
    lora = LoraSection(targets=r".*(q_proj|linear_1)", modules_to_save=("multi_modal_projecter",))
    found = adapter_faults(lora, empty(section()), "recipe")
    said = [(each.key, each.problem) for each in found]
    assert said[0][0] == "model.adapter.modules_to_save"
    assert found[0].mend == "Did you mean 'multi_modal_projector'?"
    assert "vision_tower, model.vision_tower" in said[1][1] and "and 2 more" in said[1][1]
    assert "multi_modal_projector, model.multi_modal_projector.linear_1" in said[2][1]
    assert len(said) == 3


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"targets": "nothing"}, "matches no linear"),
        ({"targets": "("}, "no regular expression"),
        ({"modules_to_save": ("lm_head",)}, "lm_head is tied"),
    ],
)
def test_other_faults_of_an_adapter(lora: dict[str, Any], words: str) -> None:
    found = adapter_faults(LoraSection(**lora), empty(section()), "recipe")
    assert len(found) == 1 and words in found[0].problem
    assert found[0].key.startswith("model.adapter.")


def test_a_faulty_adapter_still_shows_the_modules() -> None:
    model = section(adapter=LoraSection(targets=".*q_proj"))
    table = {group.name: group for group in groups(model, empty(model), faulty=True)}
    assert table["vision_tower"].wrapped == 3
    assert table["language_model q_proj"].wrapped == 4
    assert totals(list(table.values())).trained == 0


def test_no_weight_is_there_or_read(weightless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors
    import torch
    import transformers

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors, "safe_open", read)
    monkeypatch.setattr(torch, "load", read)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", read)
    vlm = empty(section(weightless))
    assert {p.device.type for p in vlm.core.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "processor_config.json").unlink(), "cannot be read"),
    ],
)
def test_a_folder_with_a_part_missing(
    change: Any, words: str, weightless: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(weightless, folder)
    change(folder)
    vlm, found = empty_vlm(section(folder), "recipe")
    assert vlm is None and len(found) == 1
    assert found[0].key == "model.path" and words in found[0].problem


@pytest.mark.parametrize("name", sorted(qwen.FAMILIES))
def test_other_families_need_no_weights_either(name: str, tmp_path: Path) -> None:
    model = section(qwen.FAMILIES[name](tmp_path / name))
    whole = sum(p.numel() for p in load_vlm(model).core.parameters())
    for file in (tmp_path / name).glob("*.safetensors"):
        file.unlink()
    vlm = empty(model)
    pair = make_pairs(1)[0]
    (made,), skips = tokenise(vlm, [pair], None)
    assert not skips
    sample = sample_of(vlm, made)
    rows, columns = vlm.grid((96, 96))
    assert [span.tokens for span in sample.prompt if span.image] == [rows * columns]
    assert [(span.text, span.loss) for span in sample.chosen] == [
        (f"{pair.chosen}<|im_end|>\n", True)
    ]
    table = groups(model, vlm, faulty=False)
    total = totals(table)
    assert total.total == whole and total.wrapped == 7 * 3
    assert {group.name.partition(" ")[0] for group in table if group.trained} == {"language_model"}
