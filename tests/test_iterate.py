"""Rounds: each starts from the model of the last, and the same command goes on where it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mlalign import cli_stages
from mlalign.cli import app
from mlalign.images import open_image
from mlalign.models.loading import load_vlm
from mlalign.records import Preference
from mlalign.sections import ModelSection
from mlalign.store import read_preferences
from tests._syntax import REPOSITORY

RECIPE = REPOSITORY / "recipes/microworld/align.yaml"
SMALL = [
    "name=it",
    "data.builders=[{name: povid}]",
    "data.examples=12",
    "train.steps=2",
    "train.warmup=0",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "probes.methods=[]",
    "eval.benchmarks=[]",
]


def logits(folder: Path, adapter: Path | None, pair: Preference) -> torch.Tensor:
    vlm = load_vlm(ModelSection(path=str(folder), dtype="float32"), adapter=adapter)
    image = vlm.image(open_image(pair.image, pair.id))
    prefix = vlm.prefix_ids(pair.prompt, image.size)
    with torch.no_grad():
        return vlm.model(
            input_ids=torch.tensor([prefix]), pixel_values=image.tensors["pixel_values"]
        ).logits


def stamps(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): os.stat(p).st_mtime_ns for p in folder.rglob("*.safetensors")
    } | {str(p): os.stat(p).st_mtime_ns for p in folder.rglob("*.parquet")}


def test_two_rounds_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["iterate", str(RECIPE), *SMALL, "--rounds", "2"]

    trained = cli_stages.train
    rounds: list[str] = []

    def stopped(recipe: object, run: Path) -> None:
        rounds.append(run.name)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        trained(recipe, run)  # type: ignore[arg-type]

    monkeypatch.setattr(cli_stages, "train", stopped)
    assert CliRunner().invoke(app, command).exit_code != 0
    assert rounds == ["it-round1", "it-round2"]
    first = tmp_path / "runs/it-round1"
    before = stamps(first)

    monkeypatch.setattr(cli_stages, "train", trained)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert stamps(first) == before, "what was there was made again"

    second = yaml.safe_load((tmp_path / "runs/it-round2/recipe.yaml").read_text())
    merged = Path(second["model"]["path"])
    assert merged == Path("runs/it-round1/povid/merged") and second["seed"] == 1
    pair = next(iter(read_preferences(tmp_path / "runs/it-round1/data/povid")))
    builtin = REPOSITORY / "mlalign/microworld/base"
    base = logits(builtin, None, pair)
    adapted = logits(builtin, first / "povid/adapter", pair)
    assert (base - adapted).abs().max() > 1e-4
    torch.testing.assert_close(logits(merged, None, pair), adapted, atol=1e-4, rtol=0)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    several = CliRunner().invoke(app, ["iterate", str(RECIPE)])
    assert "one adapter a round" in str(several.exception)
    packed = CliRunner().invoke(app, ["iterate", str(RECIPE), *SMALL, "model.quantize=4bit"])
    assert "merges each round's adapter" in str(packed.exception)
    assert not (tmp_path / "runs").exists()
