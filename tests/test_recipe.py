"""Reading a recipe: what is wrong is named, with the key and the mend."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlalign.recipe import MethodRef, RecipeError, from_dict, load, save

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"path": "builtin:microworld"},
    "data": {"source": {"name": "microworld", "images": 8}, "builders": ["povid"]},
    "train": {
        "objective": {"name": "dpo", "beta": 0.1},
        "learning_rate": 1e-4,
        "batch_size": 4,
        "steps": 2,
    },
}


def changed(dotted: str, value: Any) -> dict[str, Any]:
    """SMALL with one key set."""
    raw = copy.deepcopy(SMALL)
    *path, last = dotted.split(".")
    node = raw
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    return raw


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    return file


def test_a_small_recipe(small: Path) -> None:
    recipe = load(small)
    assert recipe.arms() == ["povid"]
    assert recipe.train.objective == MethodRef(name="dpo", beta=0.1)  # type: ignore[call-arg]
    assert recipe.train.objective.settings() == {"beta": 0.1}
    assert recipe.data.source is not None
    assert recipe.data.source.settings() == {"images": 8}


def test_saved_and_read_again(small: Path, tmp_path: Path) -> None:
    recipe = load(small)
    save(recipe, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("dotted", "near"),
    [
        ("train.learning_rat", "learning_rate"),
        ("trian", "train"),
        ("data.builder", "builders"),
        ("launch.zero_stage", "zero"),
        ("eval.image", "images"),
    ],
)
def test_unknown_key_gives_the_nearest(dotted: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        from_dict(changed(dotted, 1), "small.yaml")
    assert "small.yaml" in str(caught.value)
    assert f"{dotted}: unknown key; did you mean '{near}'?" in str(caught.value)


def test_unknown_adapter_key_is_named_too() -> None:
    with pytest.raises(RecipeError, match="rang"):
        from_dict(changed("model.adapter", {"rang": 8}))


def test_far_off_key_lists_those_known() -> None:
    with pytest.raises(RecipeError, match=r"known: .*learning_rate"):
        from_dict(changed("train.qqqq", 1))


@pytest.mark.parametrize("section", ["name", "model", "data", "train"])
def test_mandatory_keys_have_no_default(section: str) -> None:
    raw = copy.deepcopy(SMALL)
    del raw[section]
    with pytest.raises(RecipeError, match=section):
        from_dict(raw)


@pytest.mark.parametrize(
    ("dotted", "value", "says"),
    [
        ("train.learning_rate", 0, "train.learning_rate"),
        ("train.batch_size", 0, "train.batch_size"),
        ("train.epochs", 1, "exactly one of epochs and steps"),
        ("train.steps", None, "exactly one of epochs and steps"),
        ("launch.zero", 1, "launch.zero"),
        ("launch.offload", True, "launch.offload needs launch.zero: 3"),
        ("data.builders", [], "nothing to train on"),
        ("data.source", None, "data.builders need data.source"),
        ("model.adapter", {"dropout": 0.1}, "train.layout: padded"),
        ("model.quantize", "3bit", "model.quantize"),
    ],
)
def test_values_that_cannot_be(dotted: str, value: Any, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        from_dict(changed(dotted, value))
    assert says in str(caught.value)


def test_all_faults_at_once() -> None:
    raw = changed("train.learning_rat", 1)
    raw["launch"] = {"zero": 7}
    with pytest.raises(RecipeError) as caught:
        from_dict(raw)
    assert "learning_rat" in str(caught.value) and "launch.zero" in str(caught.value)


def test_overrides(small: Path) -> None:
    recipe = load(
        small,
        [
            "train.learning_rate=1e-5",
            "train.objective.beta=0.2",
            "launch.processes=2",
            "model.adapter.rank=4",
            "model.path=a/b",
            "probes.methods=[image_reliance]",
        ],
    )
    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.objective.settings() == {"beta": 0.2}
    assert recipe.launch.processes == 2
    assert recipe.model.adapter != "none" and recipe.model.adapter.rank == 4
    assert recipe.model.path == "a/b"
    assert [ref.name for ref in recipe.probes.methods] == ["image_reliance"]


def test_override_of_a_method_given_by_name_only(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(changed("train.objective", "dpo")), encoding="utf-8")
    recipe = load(file, ["train.objective.beta=0.3"])
    assert recipe.train.objective.name == "dpo"
    assert recipe.train.objective.settings() == {"beta": 0.3}


def test_override_of_an_unknown_key(small: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'steps'"):
        load(small, ["train.step=3"])


@pytest.mark.parametrize("text", ["train.steps", "=3", ""])
def test_override_without_a_value(small: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="key=value"):
        load(small, [text])


def test_override_through_something_that_is_no_section(small: Path) -> None:
    with pytest.raises(RecipeError, match=r"name\.x"):
        load(small, ["name.x=1"])


def test_override_of_a_list_item(small: Path) -> None:
    recipe = load(small, ["data.builders.0=rlaif_v"])
    assert recipe.arms() == ["rlaif_v"]


@pytest.mark.parametrize("text", ["data.builders.5=rlaif_v", "data.builders.x=rlaif_v"])
def test_override_of_a_list_item_that_is_not_there(small: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="builders"):
        load(small, [text])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot read"):
        load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: [", "not valid YAML"), ("- a\n- b\n", "mapping with the keys name"), ("", "mapping")],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=says):
        load(file)


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load(file)


def test_an_arm_may_train_otherwise() -> None:
    raw = {
        "name": "two",
        "model": {"path": "m"},
        "data": {
            "source": "microworld",
            "builders": [
                "povid",
                {"name": "ha_dpo", "train": {"learning_rate": 1e-6, "epochs": 2}},
            ],
        },
        "train": {"objective": "dpo", "learning_rate": 1e-3, "batch_size": 4, "steps": 5},
    }
    parsed = from_dict(raw)
    assert parsed.train_of("povid") == parsed.train
    changed = parsed.train_of("ha_dpo")
    assert (changed.learning_rate, changed.steps, changed.epochs) == (1e-6, None, 2)
    assert changed.batch_size == 4 and "train" not in parsed.data.builders[1].settings()
    raw["data"]["builders"][1]["train"] = {"learning_rat": 1}
    with pytest.raises(RecipeError, match="learning_rat"):
        from_dict(raw)
