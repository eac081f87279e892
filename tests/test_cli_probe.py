"""``mlalign probe`` reads off a checkpoint what training read, and refuses what does not load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from mlalign import store
from mlalign.cli import app
from mlalign.cli_probe import end_of
from mlalign.models.loading import ModelError, load_adapter, load_vlm_from
from mlalign.probes import _records
from mlalign.report.show import show
from mlalign.runlog import READINGS, read_lines
from mlalign.train import __main__ as train
from mlalign.train.launch import PROBES_FAILED
from tests._syntax import REPOSITORY
from tests.probes import tiny
from tests.train.pairs import make_pairs

PROBES = ["image_reliance", "neuron_drift", "top_drifted"]
KEYS = [name for name in READINGS if name not in ("arm", "value", "noise", "lo", "hi")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pairs, and a trained run with probes and checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("made")
    vlm = tiny.new_vlm()
    vlm.model.save_pretrained(folder / "model")
    vlm.processor.save_pretrained(folder / "model")
    store.write_preferences(folder / "pairs", make_pairs(8), {})
    run = folder / "runs/trained"
    _records.save(run / "probe_set", tiny.records(3))
    assert trained(folder, run, {"methods": PROBES, "every": 2, "rare": False}) == 0
    return folder


def trained(folder: Path, run: Path, probes: dict[str, Any], **section: Any) -> int:
    """Exit status of training four steps into ``run``."""
    raw = {
        "name": run.name,
        "model": {
            "path": str(folder / "model"),
            "dtype": "float32",
            "adapter": {"rank": 2},
            **section,
        },
        "data": {"pairs": {"arm": str(folder / "pairs")}, "vocabulary": "microworld"},
        "train": {
            "objective": {"name": "dpo", "beta": 0.1},
            "learning_rate": 5e-3,
            "batch_size": 2,
            "micro_batch_size": 2,
            "steps": 4,
            "save_every": 2,
        },
        "probes": {"records": 3, "batch_size": 2, **probes},
        "launch": {"launcher": "none", "zero": 0},
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(raw))
    if not (run / "manifest.json").is_file():
        (run / "manifest.json").write_text("{}")
    return train.main([str(run / "recipe.yaml")])


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """The trained run, to write into."""
    return Path(shutil.copytree(made / "runs/trained", tmp_path / "trained"))


def call(run: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["probe", str(run), *words])


def same(folder: Path, other: Path, step: int, most: float = 1e-6) -> None:
    """Both folders hold the same readings of ``step``, and some of them are not nothing."""
    frames = []
    for each in (folder, other):
        frame: Any = pd.read_parquet(each)
        frames.append(frame[frame["step"] == step].sort_values(KEYS).reset_index(drop=True))
    assert len(frames[0]) > 100 and frames[0][KEYS].equals(frames[1][KEYS])
    for name in ("value", "noise", "lo", "hi"):
        one, two = (frame[name].to_numpy() for frame in frames)
        np.testing.assert_allclose(one, two, rtol=most, atol=most)
    delta = frames[0][(frames[0]["side"] == "delta") & (frames[0]["value"].abs() > 1e-3)]
    assert len(delta) > 10, "nothing moved, so nothing is compared"


@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_reads_as_it_did_while_training(run: Path, step: int) -> None:
    done = call(run, "--checkpoint", str(step))
    assert done.exit_code == 0, done.output
    same(run / "probes/arm", run / "probes/arm.probed", step)
    assert "image_reliance" in done.output and "swapped_per_token" in done.output
    rows = [r for r in read_lines(run / "metrics.jsonl") if "probe/seconds" in r]
    by_arm = {r["arm"]: r for r in rows if r["step"] == step}
    key = "probe/image_reliance/blank/own"
    assert by_arm["arm.probed"][key] == pytest.approx(by_arm["arm"][key], abs=1e-6)


def test_show_says_what_was_read_of_a_record(run: Path) -> None:
    record = json.loads((run / "probe_set/records.jsonl").read_text().splitlines()[0])["id"]
    text = show(run, record)
    frame = pd.read_parquet(run / "probes/arm")
    keys = {"metric": "blank", "group": "own", "side": "adapted", "record": record}
    for name, value in keys.items():
        frame = frame[frame[name] == value]
    values = dict(zip(frame["step"], frame["value"], strict=True))
    assert sorted(values) == [0, 2, 4]
    said = ", ".join(f"{step}: {values[step]:.3g}" for step in (0, 2, 4))
    assert f"  arm blank own adapted  step {said}" in text


def test_again_takes_the_place_and_other_steps_stay(run: Path) -> None:
    words = ("probes.methods=[image_reliance]", "--arm", "arm")
    for _ in range(2):
        assert call(run, *words).exit_code == 0
    assert call(run, *words, "--checkpoint", "2").exit_code == 0
    rows = [r["step"] for r in read_lines(run / "metrics.jsonl") if r["arm"] == "arm.probed"]
    assert sorted(rows) == [2, 4]
    files = sorted(f.name for f in (run / "probes/arm.probed").glob("*.parquet"))
    assert files == ["image_reliance-2.parquet", "image_reliance-4.parquet"]
    other = call(run, *words, "--probe-set", str(run / "nowhere"))
    assert "no probe set" in str(other.exception)


def test_the_rare_tier_runs_where_the_recipe_does_not_forbid_it(run: Path, tmp_path: Path) -> None:
    words = ("probes.methods=[attention_knockout]", "--out", str(tmp_path / "out"))
    assert call(run, *words, "probes.rare=true").exit_code == 0
    assert len(list((tmp_path / "out/probes/arm.probed").glob("*.parquet"))) == 1
    assert not (run / "probes/arm.probed").exists()


def test_an_adapter_and_the_model_it_was_merged_into_read_alike(run: Path, tmp_path: Path) -> None:
    """A folder that no run knows; merging moves log-probs by rounding only."""
    outside = tmp_path / "somewhere"
    shutil.copytree(run / "arm/adapter", outside / "lora")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    base = recipe["model"]["path"]
    vlm = load_vlm_from(base, dtype="float32")
    merged = load_adapter(vlm.model, outside / "lora").merge_and_unload()
    merged.save_pretrained(outside / "whole")
    vlm.processor.save_pretrained(outside / "whole")
    words = ("probes.methods=[image_reliance]",)
    for option, name in (("--adapter", "lora"), ("--model", "whole")):
        done = call(run, option, str(outside / name), *words)
        assert done.exit_code == 0, done.output
    same(run / "probes/lora.probed", run / "probes/whole.probed", 1, most=2e-4)
    assert call(run, *words).exit_code == 0
    ours, theirs = (pd.read_parquet(run / f"probes/{n}.probed") for n in ("arm", "lora"))
    np.testing.assert_allclose(ours["value"], theirs["value"], rtol=1e-6, atol=1e-6)

    shutil.copytree(run / "arm/adapter", tmp_path / "another/lora")
    clash = call(run, "--adapter", str(tmp_path / "another/lora"), *words)
    assert "holds readings of" in str(clash.exception) and "--out" in str(clash.exception)


def test_a_fully_trained_model_is_read_against_the_recipes_base(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "full"
    shutil.copytree(made / "runs/trained/probe_set", run / "probe_set")
    probes = {"methods": ["image_reliance"], "every": 2}
    assert trained(made, run, probes, adapter="none") == 0
    for words in (["--checkpoint", "2"], []):
        done = call(run, *words)
        assert done.exit_code == 0, done.output
    for step in (2, 4):
        same(run / "probes/arm", run / "probes/arm.probed", step)


Change = Callable[[dict[str, Any]], None]


def _delete(weights: dict[str, Any]) -> None:
    del weights[sorted(weights)[0]]


def _rename(weights: dict[str, Any]) -> None:
    name = sorted(weights)[0]
    weights[name.replace("layers.0", "blocks.0")] = weights.pop(name)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_delete, [r"1 missing (base_model.model.model.language_model.layers.0."]),
        (_rename, ["1 missing (base_model", "1 without a place (base_model", "blocks.0"]),
    ],
)
@pytest.mark.parametrize("of", ["checkpoint", "adapter"])
def test_an_adapter_that_does_not_load_whole_is_refused(
    run: Path, change: Change, named: list[str], of: str
) -> None:
    folder = run / ("arm/checkpoints/checkpoint-2" if of == "checkpoint" else "arm/adapter")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    words = ("--checkpoint", "2") if of == "checkpoint" else ("--adapter", str(folder))
    done = call(run, *words)
    assert isinstance(done.exception, ModelError)
    text = str(done.exception)
    assert all(piece in text for piece in [str(folder), *named, "Give the model"]), text
    assert not (run / "probes/arm.probed").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--checkpoint", "3"), "no complete checkpoint; arm has 2, 4"),
        (("--arm", "legs"), "--arm legs: the run has arm"),
        (("--adapter", "nowhere"), "nowhere: no adapter_config.json"),
        (("--model", "nowhere"), "nowhere: no config.json"),
        (("--adapter", "a", "--checkpoint", "2"), "give one of --adapter, --model"),
        (("probes.methods=[]",), "names no probes"),
    ],
)
def test_what_is_not_there_is_named(run: Path, words: tuple[str, ...], said: str) -> None:
    assert said in str(call(run, *words).exception)


def test_no_run(tmp_path: Path) -> None:
    assert "give a run folder" in str(call(tmp_path).exception)


def test_another_architecture_is_refused(run: Path, tmp_path: Path) -> None:
    words = ("probes.methods=[image_reliance]", "probes.records=2")
    done = call(run, "--model", str(REPOSITORY / "mlalign/microworld/base"), *words)
    assert "not the architecture of" in str(done.exception)


BROKEN = """
from tests.probes.test_pass import Broken
from pydantic import BaseModel, ConfigDict

class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

class Fails(Broken):
    Settings = Settings
    def __init__(self, settings=None):
        super().__init__("compare")

METHOD = Fails
"""


def test_a_failed_probe_decides_the_status(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of training, of the verbs that train, and of this one; everything else is there."""
    (tmp_path / "fails.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "broken"
    shutil.copytree(made / "runs/trained/probe_set", run / "probe_set")
    probes = {"methods": ["fails:Fails", "image_reliance"], "every": 0}
    assert trained(made, run, probes) == PROBES_FAILED == 3
    assert "arm: probe broken failed at step 0" in capsys.readouterr().err
    assert (run / "arm/adapter/adapter_model.safetensors").is_file()
    assert (run / "probes/arm/image_reliance-4.parquet").is_file()

    with pytest.raises(BaseException) as ended:
        end_of(["arm"], run)
    assert getattr(ended.value, "exit_code", None) == 3
    end_of(["arm"], made / "runs/trained")
    done = call(run)
    assert done.exit_code == 3 and "probe broken failed" in done.output
    assert json.loads((run / "manifest.json").read_text())["probes"]["arm"]["failed"]
