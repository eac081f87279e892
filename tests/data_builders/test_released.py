"""From a recipe that names a released set to the pairs of its arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_builders import released
from data_builders._chunks import BuildError
from data_builders.sources.povid import METHOD as POVID
from mlalign import cli_stages, recipe, runfolder
from mlalign.data.reader import load_pairs
from mlalign.recipe import Recipe, RecipeError
from mlalign.records import Preference
from mlalign.store import read_preferences
from tests.data_builders.sources.released import FIXTURES, fixture, parquet, pictures, png

POVID_FILE = FIXTURES / "povid.json"


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return pictures(tmp_path / "coco", "000000000025.jpg", "COCO_train2014_000000000030.jpg")


def povid(coco: Path, file: Path = POVID_FILE) -> Any:
    return POVID(POVID.Settings(path=str(file), images=str(coco)))


def test_manifest_counts_every_row(coco: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = released.build(povid(coco), out_folder=out, max_skipped=1.0)
    assert manifest == json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["pairs"] == 2 and manifest["records"] == 13
    counts = {reason: entry["count"] for reason, entry in manifest["skipped"].items()}
    assert sum(counts.values()) == 11
    assert counts["image cannot be read"] == 2
    assert manifest["skipped"]["image cannot be read"] == {
        "count": 2,
        "expected": False,
        "first_ids": ["povid-lost-image", "povid-outside"],
    }
    assert manifest["skipped"]["conversations: several questions"]["expected"]
    # A row that a setting leaves out is no fault.
    assert manifest["faulty_share"] == round(10 / 13, 4)
    assert manifest["source"]["path"] == str(POVID_FILE)
    assert len(manifest["source"]["files_sha256"]["povid.json"]) == 64
    stored = [pair for pair in read_preferences(out) if isinstance(pair, Preference)]
    direct = [pair for pair in povid(coco).pairs(None, 0) if isinstance(pair, Preference)]
    assert [(p.id, p.prompt, p.chosen, p.rejected, p.origin) for p in stored] == [
        (p.id, p.prompt, p.chosen, p.rejected, p.origin) for p in direct
    ]
    assert [p.image.read() for p in stored] == [png(0), png(1)]


def test_more_than_a_tenth_of_faults_fails(coco: Path, tmp_path: Path) -> None:
    good = fixture("povid.json")[0]
    rows = [{**good, "id": f"good-{n}"} for n in range(18)]
    file = tmp_path / "rows.json"

    def build(faults: int) -> dict[str, Any]:
        file.write_text(json.dumps(rows + [{"id": f"bad-{n}"} for n in range(faults)]))
        return released.build(povid(coco, file), out_folder=tmp_path / "out", max_skipped=0.1)

    assert build(2)["faulty_share"] == 0.1
    before = (tmp_path / "out" / "pairs.parquet").read_bytes()
    with pytest.raises(BuildError, match=r"(?s)lost 3 of 21 .*14\.3%.*3 x conversations: missing "
                       r"\(e\.g\. povid-bad-0, povid-bad-1, povid-bad-2\)"):  # fmt: skip
        build(3)
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == before
    file.write_text("[]")
    with pytest.raises(BuildError, match="the files hold no row"):
        released.build(povid(coco, file), out_folder=tmp_path / "no", max_skipped=1.0)
    assert not (tmp_path / "no").exists()


def made(pairs: dict[str, Any], **data: Any) -> Recipe:
    return recipe.from_dict(
        {
            "name": "ours",
            "model": {"path": "builtin:microworld"},
            "data": {"pairs": pairs, **data},
            "train": {"objective": "dpo", "learning_rate": 1e-5, "batch_size": 2, "steps": 1},
        }
    )


def test_recipe_to_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    release = tmp_path / "release"
    parquet(release / "RLHF-V-Dataset.parquet", fixture("rlhf_v_rows.json")[:2])
    loaded = made(
        {"human": {"name": "rlhf_v", "path": str(release)}, "file": str(tmp_path / "mine.jsonl")}
    )
    (tmp_path / "a.png").write_bytes(png(3))
    row = {"images": ["a.png"], "prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    cli_stages.check(loaded)
    run = runfolder.prepare(loaded)
    cli_stages.build(loaded, run)
    assert loaded.pairs_of("human", run) == run / "data" / "human"
    assert not (run / "data" / "file").exists()
    pairs, skipped = load_pairs(loaded.pairs_of("human", run))
    assert [pair.id for pair in pairs] == ["rlhf_v-0", "rlhf_v-1"] and not skipped
    assert [len(pair.segments) for pair in pairs] == [2, 0]
    kept = json.loads((run / "manifest.json").read_text())["data"]
    assert kept["human"] == json.loads((run / "data/human/manifest.json").read_text())["sha256"]
    # A second build leaves what is there.
    before = (run / "data" / "human" / "pairs.parquet").stat().st_mtime_ns
    cli_stages.build(loaded, run)
    assert (run / "data" / "human" / "pairs.parquet").stat().st_mtime_ns == before


def test_limit_and_max_skipped_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = parquet(tmp_path / "rows.parquet", fixture("rlhf_v_rows.json")[:4])
    pairs = {"human": {"name": "rlhf_v", "path": str(file)}}
    run = runfolder.prepare(made(pairs))
    with pytest.raises(BuildError, match=r"lost 2 of 4 .*data\.max_skipped = 0\.1"):
        cli_stages.build(made(pairs), run)
    cli_stages.build(made(pairs, examples=1), run)
    assert len(load_pairs(run / "data" / "human")[0]) == 1
    other = made({"other": pairs["human"]}, max_skipped=0.5)
    cli_stages.build(other, run)
    assert len(load_pairs(run / "data" / "other")[0]) == 2


def test_check_finds_what_is_wrong_with_a_source_of_pairs() -> None:
    with pytest.raises(RecipeError, match=r"data\.pairs\.a.*min_match"):
        cli_stages.check(made({"a": {"name": "rlhf_v", "path": "x", "min_match": 0}}))
    with pytest.raises(ValueError, match="rlhf_v"):
        cli_stages.check(made({"a": {"name": "rlhf_w", "path": "x"}}))
    with pytest.raises(RecipeError, match=r"microworld.*gives no pairs.*data\.source"):
        cli_stages.check(made({"a": {"name": "microworld"}}))
    wrong = made({"a": "x.jsonl"}, source={"name": "mdpo", "path": "x", "images": "y"})
    with pytest.raises(RecipeError, match=r"data\.source: source 'mdpo' gives no examples"):
        cli_stages.check(wrong)
