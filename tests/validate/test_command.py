"""The command: its exit status, its JSON, and every recipe of the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlalign import store
from mlalign.cli import app
from mlalign.microworld.export import export
from mlalign.validate.examine import examine
from tests._syntax import REPOSITORY
from tests.data_builders.sources.released import FIXTURES, pictures
from tests.test_in_house import overrides
from tests.train.pairs import make_pairs
from tests.validate import planted

RECIPES = sorted(p for p in (REPOSITORY / "recipes").rglob("*.yaml") if p.name != "base.yaml")


def test_status_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    rows = planted.clean_rows(tmp_path, 8)
    file = planted.recipe(tmp_path / "recipe.yaml", planted.write(tmp_path / "p.jsonl", rows))
    runner = CliRunner()
    done = runner.invoke(app, ["validate", str(file), "--no-color", "--json", "out.json"])
    assert done.exit_code == 0, done.output
    assert done.output.rstrip().endswith("no fault")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["passed"] and found["faults"] == [] and found["arms"]["ours"]["usable"] == 8
    assert found["trains"] and found["sample"]["record"] == "r1"

    rows[4]["chosen"] = ""
    planted.write(tmp_path / "p.jsonl", rows)
    done = runner.invoke(
        app, ["validate", str(file), "train.objective.beta=-1", "--json", "out.json"]
    )
    assert done.exit_code == 1, done.output
    assert done.output.rstrip().endswith("2 faults")
    found = json.loads((tmp_path / "out.json").read_text())
    assert not found["passed"]
    assert [(f["key"], f["row"]) for f in found["faults"]] == [
        ("train.objective.dpo.beta", None),
        ("chosen", 5),
    ]
    # No run folder is made.
    assert not (tmp_path / "runs").exists()


def test_limit_shortens_the_list_and_not_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = planted.clean_rows(tmp_path, 12)
    for row in rows[2:]:
        row["images"] = ["gone.png"]
    file = planted.recipe(tmp_path / "recipe.yaml", planted.write(tmp_path / "p.jsonl", rows))
    out = tmp_path / "out.json"
    command = ["validate", str(file), "--limit", "3", "--json", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.output.count("gone.png") == 3 and "and 7 more like it" in done.output
    assert len(json.loads(out.read_text())["faults"]) == 10


def test_built_pairs_are_checked_with_what_the_build_skipped(
    tmp_path: Path, weightless: Path
) -> None:
    built = {"source": "microworld", "builders": ["povid"], "vocabulary": "microworld"}
    file = planted.recipe(tmp_path / "recipe.yaml", data=built)
    manifest = {"skipped": {"nothing wrong": {"count": 3, "expected": True, "first_ids": []}}}
    store.write_preferences(tmp_path / "checked" / "data" / "povid", make_pairs(5), manifest)
    out = examine(file, [f"model.path={weightless}"], runs=tmp_path)
    assert out.findings == []
    assert out.reports["povid"]["skipped_by_build"] == {"nothing wrong": 3}
    assert out.reports["povid"]["usable"] == 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(REPOSITORY / "recipes")))
def test_every_recipe_passes_but_for_what_is_not_here(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder where no data lies, so that this says the same on every machine.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = examine(path).faults
    assert [each.text for each in found if not each.absent] == []


@pytest.mark.parametrize("name", ["quickstart.yaml", "microworld/align.yaml"])
def test_the_built_in_worlds_recipes_pass(name: str, tmp_path: Path) -> None:
    out = examine(REPOSITORY / "recipes" / name, runs=tmp_path)
    assert out.faults == []
    assert {found.group for found in out.notes} == {"arms not built yet"}


def test_recipes_of_the_users_own_data_pass_with_their_fixture(
    tmp_path: Path, weightless: Path
) -> None:
    user = export(tmp_path / "user", pairs=8, pictures=16)
    template = REPOSITORY / "recipes" / "in_house" / "template.yaml"
    out = examine(template, overrides(weightless, user), runs=tmp_path)
    assert out.findings == [] and out.reports["ours"]["usable"] == 8
    photos = REPOSITORY / "recipes" / "photos" / "run.yaml"
    mine = [
        f"model.path={weightless}",
        f"data.source.folder={user / 'pictures'}",
        "data.source.probe=2",
        "data.source.heldout_share=0.5",
    ]
    out = examine(photos, mine, runs=tmp_path)
    assert out.faults == []
    for name in ("claim_grpo/photos", "llava_rlhf/photos", "vigor/photos", "vigor/photos.reward"):
        out = examine(REPOSITORY / "recipes" / f"{name}.yaml", mine, runs=tmp_path)
        assert out.faults == [] and {found.group for found in out.notes} == {"arms not built yet"}


def test_rewarded_presets_pass_with_their_fixture(tmp_path: Path, weightless: Path) -> None:
    names = ("000000000025.jpg", "000000000030.jpg", "000000000041.jpg", "000000000043.jpg")
    images = pictures(tmp_path / "coco", *names)
    user = export(tmp_path / "user", pairs=8, pictures=16)
    folder = {"name": "photo_folder", "folder": str(user / "pictures"), "probe": 2}
    folder["heldout_share"] = 0.5
    captions = FIXTURES / "image_to_caption.json"
    comparisons = {
        "data.pairs.llava_rlhf.path": FIXTURES / "llava_7b_v1_preference.json",
        "data.pairs.llava_rlhf.images": images,
        "data.pairs.llava_rlhf.captions": captions,
    }
    ratings = {
        "data.pairs.vigor.path": FIXTURES / "annotations.json",
        "data.pairs.vigor.images": images,
    }
    prompts = {
        "data.source.path": FIXTURES,
        "data.source.images": images,
        "data.source.captions": captions,
        **{f"{key}.source": json.dumps(folder) for key in ("eval", "probes")},
    }
    for name, given in (
        ("llava_rlhf/llava15_7b.script.reward", comparisons),
        ("llava_rlhf/llava15_7b.script", prompts),
        ("vigor/llava15_7b.reward", ratings),
    ):
        mine = [f"model.path={weightless}", *(f"{key}={value}" for key, value in given.items())]
        out = examine(REPOSITORY / "recipes" / f"{name}.yaml", mine, runs=tmp_path)
        assert [found.text for found in out.faults] == []
        assert {found.group for found in out.notes} >= {"arms not built yet"}
