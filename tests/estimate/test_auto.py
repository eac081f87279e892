"""From a recipe to a plan, to the choice of checkpointing, to the printed table."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import typer
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig
from typer.testing import CliRunner

from mlalign.cli_estimate import estimate as verb
from mlalign.estimate import auto, flops
from mlalign.estimate.geometry import GeometryError, read
from mlalign.estimate.memory import estimate
from mlalign.estimate.plan import plan_of, rows_of
from mlalign.estimate.rows import PlanError, Rows
from mlalign.recipe import Recipe, from_dict
from tests._syntax import REPOSITORY
from tests.estimate import tiny

RECIPE = REPOSITORY / "recipes" / "microworld" / "align.yaml"
ROWS = Rows(prefix=60, completions=(30, 20))


def recipe(**sections: Any) -> Recipe:
    train = {"objective": "dpo", "learning_rate": 1e-4, "batch_size": 8, "steps": 1}
    return from_dict(
        {
            "name": "x",
            "model": {
                "path": "builtin:microworld",
                "dtype": "float32",
                **sections.get("model", {}),
            },
            "data": {"pairs": {"a": "pairs.jsonl"}},
            "train": {**train, **sections.get("train", {})},
            "launch": sections.get("launch", {}),
        }
    )


def test_fits_up_to_four_fifths_of_what_is_free_and_no_further() -> None:
    made = tiny.config()
    geometry = read(made)
    need = estimate(geometry, plan_of(recipe(), geometry, rows=ROWS, checkpointing=False))
    for loaded, wanted in ((False, need.total), (True, need.total - need.weights)):
        enough = -(-wanted * 5 // 4)
        keys: dict[str, Any] = {"config": made, "rows": ROWS, "loaded": loaded}
        assert auto.fits(recipe(), enough, **keys)
        assert not auto.fits(recipe(), enough - 2, **keys)


def test_fits_reads_the_recipes_own_model_and_its_micro_batch() -> None:
    small, large = recipe(), recipe(train={"micro_batch_size": 64, "batch_size": 64})
    assert auto.fits(small, 2**30)
    assert not auto.fits(large, 2**30)


def test_free_bytes_are_shared_by_the_processes_of_a_machine() -> None:
    if torch.cuda.is_available():
        pytest.skip("counts a GPU's memory, not the host's")
    alone, one_of_four = auto.free_bytes(), auto.free_bytes(4)
    assert 0 < one_of_four < alone / 3


@pytest.mark.parametrize(
    ("model", "launch", "expected"),
    [
        ({}, {}, (4, 4, 0, 0)),
        ({"dtype": "bfloat16"}, {}, (2, 2, 0, 0)),
        ({"dtype": "bfloat16"}, {"launcher": "none"}, (2, 4, 2, 2)),
        ({"dtype": "bfloat16"}, {"zero": 0}, (2, 4, 2, 2)),
        ({"dtype": "bfloat16", "quantize": "4bit"}, {"launcher": "none"}, (2, 2, 0, 0)),
        ({"dtype": "bfloat16", "adapter": "none"}, {"launcher": "none"}, (2, 2, 0, 0)),
    ],
)
def test_bytes_of_weights_adapters_and_copies(model: dict, launch: dict, expected: tuple) -> None:
    plan = plan_of(recipe(model=model, launch=launch), read(tiny.config()))
    found = (plan.dtype_bytes, plan.trained_bytes, plan.copy_bytes, plan.cast_bytes)
    assert found == expected
    assert plan.zero == (0 if launch else 2)


def test_rows_are_cut_to_the_recipes_length() -> None:
    geometry = read(LlavaConfig(text_config=LlamaConfig(vocab_size=32064)))
    rows = rows_of(recipe(), geometry)
    assert (rows.prefix, rows.completions, rows.layout) == (600, (200, 200), "shared")
    cut = rows_of(recipe(train={"max_length": 650, "layout": "padded"}), geometry)
    assert (cut.completions, cut.layout) == ((50, 50), "padded")
    with pytest.raises(PlanError, match="max_length 600 leaves no completion token"):
        rows_of(recipe(train={"max_length": 600}), geometry)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"adapter": {"targets": "nothing"}}, r"targets.*'nothing'.*q_proj"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, r"modules_to_save.*lm_head"),
        ({"adapter": "none", "quantize": "4bit"}, r"model\.quantize"),
    ],
)
def test_a_step_that_cannot_be_estimated_names_its_key(model: dict, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_of(recipe(model=model), read(tiny.config()))


def test_another_family_is_refused_with_the_mend() -> None:
    config = AutoConfig.for_model("paligemma")
    with pytest.raises(GeometryError, match="gradient_checkpointing: true or false"):
        auto.fits(recipe(), 2**40, config=config)


def test_json_of_the_verb_agrees_with_the_parts() -> None:
    found = json.loads(run("--json", "--completion", "50", "--cached"))
    loaded = from_dict(recipe().model_dump(mode="json"))
    geometry = read(AutoConfig.from_pretrained(REPOSITORY / "mlalign" / "microworld" / "base"))
    rows = Rows(prefix=36 + 24, completions=(50, 50))
    assert found["rows"]["prefix"] == rows.prefix and found["rows"]["tokens"] == rows.tokens
    plan = plan_of(loaded, geometry, rows=rows, reference_live=False)
    cost = flops.step(geometry, plan)
    assert found["flops_per_pair"]["total"] == cost.total
    assert found["flops_per_step"] == pytest.approx(16 * cost.total)
    padded = replace(plan, rows=replace(rows, layout="padded"))
    assert found["padded_over_shared"]["flops"] == flops.ceiling(geometry, plan, padded)
    assert found["parameters"]["total"] == geometry.parameters
    parts = {k: v for k, v in found["bytes"].items() if k not in ("total", "host")}
    assert sum(parts.values()) == found["bytes"]["total"]


def test_the_table_says_what_is_asked_and_what_is_assumed() -> None:
    text = run("train.gradient_checkpointing=true", "train.max_length=90")
    for words in ("2,443,392", "221,184", "padded / shared", "auto would choose", "cut to 30"):
        assert words in text
    assert "checkpointing in this estimate" in text


def test_a_tower_of_this_package_is_counted() -> None:
    from mlalign.models._effnet_tower import EffnetLite0Config

    geometry = read(LlavaConfig(vision_config=EffnetLite0Config(), text_config=LlamaConfig()))
    assert geometry.tower.parameters > 3e6 and geometry.tower.flops > 5e8
    wider = read(LlavaConfig(vision_config=CLIPVisionConfig(), text_config=LlamaConfig()))
    assert wider.tower.layer_flops > 0 == geometry.tower.layer_flops


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(verb)
    outcome = CliRunner().invoke(app, [str(RECIPE), *arguments], env={"COLUMNS": "200"})
    assert outcome.exit_code == 0, outcome.output
    return outcome.output
