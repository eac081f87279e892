"""Faults of keys, methods, launch and sources: all in one run, each with the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlalign import cli_stages
from mlalign.recipe import RecipeError, load
from mlalign.validate.examine import examine
from mlalign.validate.keys import opened
from tests.validate import planted


def keys(file: Path, *overrides: str) -> list[str]:
    return [found.key for found in examine(file, overrides, runs=file.parent / "runs").faults]


def write(folder: Path, raw: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


def test_faults_of_every_part_are_found_at_once(tmp_path: Path) -> None:
    pairs = planted.write(tmp_path / "pairs.jsonl", planted.clean_rows(tmp_path, 4))
    raw = yaml.safe_load(planted.recipe(tmp_path / "r.yaml", pairs).read_text())
    raw["train"] |= {
        "objective": {"name": "dpo", "beta": -0.1, "betaa": 1},
        "learning_rat": 1,
        "epochs": 3,
        "batch_size": 3,
        "micro_batch_size": 2,
    }
    raw["model"] = {"path": "./gone", "dtype": "float16"}
    raw["launch"] = {"zero": 2, "offload": True, "processes": 2, "hostfile": "gone"}
    raw["probes"] = {"methods": ["neuron_drif"], "source": {"name": "photo_foldr"}}
    raw["eval"] = {"benchmarks": ["chair"]}
    raw["data"]["vocabulary"] = "cocoa"
    found = examine(write(tmp_path, raw), runs=tmp_path / "runs").faults
    by_key = {each.key: each.problem + each.mend for each in found}
    assert list(by_key) == [
        "train.learning_rat",
        "launch",
        "train",
        "train.objective.dpo.beta",
        "train.objective.dpo.betaa",
        "probes.methods",
        "probes.source",
        "eval.source",
        "data.vocabulary",
        "train.batch_size",
        "launch.hostfile",
        "model.dtype",
        "model.path",
    ]
    assert len(found) == len(by_key)
    assert "did you mean 'learning_rate'" in by_key["train.learning_rat"]
    assert "did you mean 'beta'" in by_key["train.objective.dpo.betaa"]
    assert "greater than 0" in by_key["train.objective.dpo.beta"]
    assert "Did you mean 'neuron_drift'" in by_key["probes.methods"]
    assert "Did you mean 'photo_folder'" in by_key["probes.source"]
    assert "exactly one of epochs and steps" in by_key["train"]


@pytest.mark.parametrize(
    ("section", "key"),
    [("model", "model"), ("train", "train"), ("data", "data"), ("name", "name")],
)
def test_a_missing_section_does_not_hide_the_rest(section: str, key: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(planted.recipe(tmp_path / "r.yaml", tmp_path / "gone.jsonl").read_text())
    raw["eval"] = {"benchmarks": ["chairs"]}
    del raw[section]
    found = keys(write(tmp_path, raw))
    assert found[0] == key and "eval.benchmarks" in found
    # Nothing is said of a stand-in.
    assert not any(name.startswith(f"{section}.") for name in found if section != "train")


def test_values_of_the_wrong_kind_and_nested_keys(tmp_path: Path) -> None:
    raw = yaml.safe_load(planted.recipe(tmp_path / "r.yaml", tmp_path / "gone.jsonl").read_text())
    raw["model"]["adapter"] = {"rank": 0, "alfa": 3}
    raw["train"]["objective"] = {"beta": 1}
    raw["train"]["batch_size"] = "many"
    raw["seed"] = "x"
    out = opened(write(tmp_path, raw), [])
    named = [found.key for found in out.findings]
    assert [key.replace(".LoraSection", "") for key in named] == [
        "seed",
        "model.adapter.rank",
        "model.adapter.alfa",
        "train.objective.name",
        "train.batch_size",
    ]
    assert out.recipe is not None and out.recipe.model.adapter.rank == 16  # type: ignore[union-attr]


def test_what_is_no_recipe_at_all(tmp_path: Path) -> None:
    assert keys(tmp_path / "gone.yaml") == ["(recipe)"]
    (tmp_path / "list.yaml").write_text("- a\n")
    assert keys(tmp_path / "list.yaml") == ["(recipe)"]
    good = planted.recipe(tmp_path / "r.yaml", tmp_path / "gone.jsonl")
    assert keys(good, "train.steps") == ["train.steps", "data.pairs.ours"]


def test_builders_without_a_source_and_nothing_to_train_on(tmp_path: Path) -> None:
    raw = yaml.safe_load(planted.recipe(tmp_path / "r.yaml").read_text())
    assert keys(write(tmp_path, raw)) == ["(recipe)"]
    raw["data"]["builders"] = ["povid"]
    raw["probes"] = {"methods": ["neuron_drif"]}
    assert keys(write(tmp_path, raw)) == ["data", "probes.methods", "probes.source"]


def test_rules_of_the_whole_recipe_are_told_one_by_one(tmp_path: Path) -> None:
    raw = yaml.safe_load(planted.recipe(tmp_path / "r.yaml").read_text())
    builder = {"name": "povid", "train": {"learning_rate": -1}}
    raw["data"] |= {"source": "microworld", "builders": [builder]}
    raw["model"]["adapter"] = {"dropout": 0.1}
    found = opened(write(tmp_path, raw), []).findings
    assert "dropout" in found[0].problem and len(found) == 2
    assert found[1].key == "data.builders.povid.train.learning_rate"


def test_the_stages_list_every_method_at_fault(tmp_path: Path) -> None:
    file = planted.recipe(
        tmp_path / "r.yaml",
        tmp_path / "gone.jsonl",
        train={"objective": {"name": "dpo", "beta": 0}},
        probes={"methods": ["neuron_drif"]},
    )
    with pytest.raises(RecipeError) as caught:
        cli_stages.check(load(file))
    said = str(caught.value)
    assert "train.objective.dpo.beta" in said and "Did you mean 'neuron_drift'" in said


def test_sources_of_arms_that_are_not_built(tmp_path: Path) -> None:
    built = {"source": "microworld", "builders": ["povid"], "vocabulary": "microworld"}
    file = planted.recipe(tmp_path / "r.yaml", data=built)
    out = examine(file, runs=tmp_path / "runs")
    assert out.faults == []
    assert [found.problem for found in out.notes] == [
        "not built yet: checked after `mlalign build`"
    ]
    gone = {"source": {"name": "photo_folder", "folder": str(tmp_path / "gone")}}
    file = planted.recipe(tmp_path / "r.yaml", data={**built, **gone})
    found = examine(file, runs=tmp_path / "runs").faults
    assert [(each.key, each.absent) for each in found] == [("data.source", True)]
    assert "captions.jsonl does not exist" in found[0].problem


def test_a_model_of_the_hub_that_is_not_here_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pairs = planted.write(tmp_path / "pairs.jsonl", planted.clean_rows(tmp_path, 4))
    file = planted.recipe(tmp_path / "r.yaml", pairs)
    out = examine(file, ["model.path=nobody/nothing-7b"], runs=tmp_path / "runs")
    assert out.faults == []
    assert [(found.key, found.absent) for found in out.notes] == [("model.path", True)]
    # The data is looked at all the same.
    assert out.reports["ours"]["usable"] == 4 and out.reports["ours"]["unit"] == "words"


def test_memory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlalign.estimate import auto

    pairs = planted.write(tmp_path / "pairs.jsonl", planted.clean_rows(tmp_path, 4))
    file = planted.recipe(tmp_path / "r.yaml", pairs)
    enough = examine(file, runs=tmp_path / "runs")
    assert enough.memory is not None and enough.findings == []
    monkeypatch.setattr(auto, "free_bytes", lambda processes: enough.memory["peak_bytes"] // 4)  # type: ignore[index]
    scarce = examine(file, runs=tmp_path / "runs")
    assert [found.key for found in scarce.findings] == ["memory"]
    assert scarce.memory is not None and scarce.memory["checkpointing"]
