"""Training with probes on gives bit for bit the weights of training without them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mlalign import store
from mlalign.probes import _records
from mlalign.recipe import from_dict
from mlalign.train import __main__ as train
from mlalign.train import launch
from tests.probes import tiny
from tests.train.pairs import make_pairs

STEPS, EVERY = 20, 5
PASSES = [0, 5, 10, 15, 20]
PROBES = ["attention_grounding", "image_reliance", "neuron_drift"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pairs and a probe set."""
    folder = tmp_path_factory.mktemp("files")
    vlm = tiny.new_vlm()
    vlm.model.save_pretrained(folder / "model")
    vlm.processor.save_pretrained(folder / "model")
    store.write_preferences(folder / "pairs", make_pairs(12), {})
    _records.save(folder / "probe_set", tiny.records(5))
    return folder


def recipe(files: Path, name: str, probes: bool, section: dict[str, Any], **more: Any) -> Any:
    """Without probes two arms on the same pairs, with them one: all three must end alike."""
    arms = ["first"] if probes else ["first", "second"]
    adapter = {"rank": 4, "alpha": 16, **more.pop("adapter", {})}
    raw = {
        "name": name,
        "seed": 3,
        "model": {"path": str(files / "model"), "dtype": "float32", "adapter": adapter},
        "data": {
            "pairs": {arm: str(files / "pairs") for arm in arms},
            "vocabulary": "microworld",
        },
        "train": {
            "objective": {"name": "dpo", "beta": 0.1},
            "learning_rate": 2e-3,
            "batch_size": 4,
            "micro_batch_size": 2,
            "steps": STEPS,
            **more,
        },
        "launch": section,
    }
    if probes:
        raw["probes"] = {"methods": PROBES, "every": EVERY, "records": 5, "batch_size": 2}
    return raw


def weights(run: Path, arm: str) -> dict[str, torch.Tensor]:
    return load_file(run / arm / "adapter" / "adapter_model.safetensors")


def check(folder: Path) -> None:
    """Off equals off, on equals off; weights moved; every pass left its files."""
    off, again = (weights(folder / "runs/off", arm) for arm in ("first", "second"))
    on = weights(folder / "runs/on", "first")
    assert off.keys() == again.keys() == on.keys() and len(off) == 2 * 7 * tiny.LAYERS
    for name, value in off.items():
        assert torch.equal(value, again[name]), f"not repeatable without probes: {name}"
        assert torch.equal(value, on[name]), f"probes changed {name}"
        if "lora_B" in name:
            assert value.abs().max() > 1e-4, f"{name} did not move"
    lines = (folder / "runs/on/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if "probe/seconds" in row] == PASSES
    for probe in [*PROBES, "attention_maps"]:
        for step in PASSES:
            table = pq.read_table(folder / f"runs/on/probes/first/{probe}-{step}.parquet")
            records = set(table["record"].to_pylist()) - {""}
            assert len(records) == 5 and table.num_rows > 20
    drift = {row["step"]: row["drift/rms/response"] for row in rows if "drift/cka/image" in row}
    assert drift[0] == 0 and drift[20] > drift[5] > 0
    assert not (folder / "runs/on/events.jsonl").read_text().count("probe disabled")


def test_one_process_with_dropout_and_checkpointing(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    section = {"launcher": "none", "zero": 0}
    # Dropout draws random numbers at every step: a pass that drew any would show.
    more = {"layout": "padded", "gradient_checkpointing": True, "adapter": {"dropout": 0.1}}
    for name in ("off", "on"):
        raw = recipe(files, name, name == "on", section, **more)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(raw))
        (tmp_path / "runs" / name).mkdir(parents=True)
        link = tmp_path / "runs" / name / "probe_set"
        link.symlink_to(files / "probe_set", target_is_directory=True)
        assert train.main([str(file)]) == 0
    check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes(zero: int, files: Path, tmp_path: Path) -> None:
    section = {"launcher": "deepspeed", "processes": 2, "zero": zero}
    for name in ("off", "on"):
        raw = recipe(files, name, name == "on", section)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(raw))
        (tmp_path / "runs" / name).mkdir(parents=True)
        link = tmp_path / "runs" / name / "probe_set"
        link.symlink_to(files / "probe_set", target_is_directory=True)
        parsed = from_dict(raw).launch
        done = subprocess.run(
            launch.command(parsed, file),
            cwd=tmp_path,
            env={**launch.environment(parsed), "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    check(tmp_path)
