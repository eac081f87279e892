"""Training through the real launcher: ZeRO stages agree, a killed run resumes, PEFT reloads it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from mlalign import store
from mlalign.data.collate import Collator, tokenise
from mlalign.models.loading import load_vlm_from
from mlalign.recipe import from_dict
from mlalign.train import checkpoints, launch
from tests.train.pairs import make_pairs

STEPS = 20


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    store.write_preferences(folder, make_pairs(24), {})
    return folder


@pytest.fixture(scope="module")
def one_process(
    tiny_llava: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of 20 steps by one process: what the others are held against."""
    run = tmp_path_factory.mktemp("one")
    _train(_recipe(tiny_llava, pairs_folder, "one", 1, 0), run)
    losses = _losses(run / "runs/one")
    assert len(losses) == STEPS and losses[0] - losses[-1] > 0.1
    return run / "runs/one"


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.long), 3])
def test_two_processes_train_to_the_same_losses(
    zero: int, one_process: Path, tiny_llava: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    _train(_recipe(tiny_llava, pairs_folder, f"zero{zero}", 2, zero), tmp_path)
    assert _losses(tmp_path / f"runs/zero{zero}") == pytest.approx(_losses(one_process), abs=1e-4)
    logged = [json.loads(line)["id"] for line in (tmp_path / f"runs/zero{zero}/pairs.jsonl").open()]
    assert len(logged) == STEPS * 4  # every rank's pairs


def test_a_killed_run_resumes_to_the_same_end(
    one_process: Path, tiny_llava: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tiny_llava, pairs_folder, "killed", 1, 0, save_every=10)
    run = tmp_path / "runs/killed"
    process = _start(recipe, tmp_path)
    sealed = run / "arm/checkpoints/checkpoint-10" / checkpoints.MANIFEST
    deadline = time.monotonic() + 240
    while not sealed.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sealed.is_file() and not (run / "arm/adapter").exists()
    half = run / "arm/checkpoints/checkpoint-15"
    half.mkdir()  # what a kill in the middle of a write could leave
    _train(recipe, tmp_path)
    assert _losses(run) == pytest.approx(_losses(one_process), abs=1e-6)
    assert [row["step"] for row in _rows(run) if "loss" in row] == list(range(1, STEPS + 1))
    for name, value in _adapter(one_process).items():
        torch.testing.assert_close(_adapter(run)[name], value, atol=1e-6, rtol=0)


def test_a_changed_checkpoint_is_refused(one_process: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    aside = tmp_path / "aside"
    aside.mkdir()
    (aside / "weights").write_bytes(b"1234")
    checkpoints.seal(aside, folder, {"data": "abc"})
    checkpoints.check(folder, {"data": "abc"})
    with pytest.raises(checkpoints.CheckpointError, match="written with data = 'abc'"):
        checkpoints.check(folder, {"data": "other"})
    (folder / "weights").write_bytes(b"12")
    with pytest.raises(checkpoints.CheckpointError, match="weights: missing or changed"):
        checkpoints.check(folder, {"data": "abc"})


def test_stock_peft_gives_the_same_logits(one_process: Path, tiny_llava: Path) -> None:
    from peft import PeftModel

    ours = load_vlm_from(tiny_llava, dtype="float32")
    from mlalign.models.loading import load_adapter

    base = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, one_process / "arm/adapter").eval()
    pair = make_pairs(1)
    tokenised, _ = tokenise(ours, pair, None)
    batch = Collator(ours, tokenised).collate(tokenised)
    inputs = {"input_ids": batch.input_ids_RT, **batch.images}
    with torch.no_grad():
        plain = ours.model(**inputs).logits
        mine = load_adapter(ours.model, one_process / "arm/adapter").eval()(**inputs).logits
        theirs = stock(**inputs).logits
    torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    assert (mine - plain).abs().max() > 1e-3


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(launch.LaunchError, match=r"train\.batch_size 6"):
        launch.accumulation(6, 2, 2)


def _recipe(
    model: Path, pairs: Path, name: str, processes: int, zero: int, save_every: int = 0
) -> dict[str, Any]:
    raw = {
        "name": name,
        "seed": 3,
        "model": {"path": str(model), "dtype": "float32", "adapter": {"rank": 4, "alpha": 16}},
        "data": {"pairs": {"arm": str(pairs)}},
        "train": {
            "objective": {"name": "dpo", "beta": 0.1},
            "learning_rate": 2e-3,
            "batch_size": 4,
            "micro_batch_size": 2,
            "steps": STEPS,
            "schedule": "cosine",
            "warmup": 0.1,
            "save_every": save_every,
        },
        "launch": {
            "launcher": "none" if processes == 1 else "deepspeed",
            "processes": processes,
            "zero": zero,
        },
    }
    from_dict(raw)
    return raw


def _start(recipe: dict[str, Any], folder: Path) -> subprocess.Popen:
    file = folder / f"{recipe['name']}.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    section = from_dict(recipe).launch
    log = (folder / "log.txt").open("a")
    return subprocess.Popen(
        launch.command(section, file),
        cwd=folder,
        env={**launch.environment(section), "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=log,
        stderr=log,
    )


def _train(recipe: dict[str, Any], folder: Path) -> None:
    process = _start(recipe, folder)
    assert process.wait(timeout=400) == 0, (folder / "log.txt").read_text()[-3000:]


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def _losses(run: Path) -> list[float]:
    return [row["loss"] for row in _rows(run) if "loss" in row]


def _adapter(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "arm/adapter/adapter_model.safetensors")
