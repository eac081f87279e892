"""Training with all probes on gives bit for bit the weights of training without them, and what it
reads is what one process reads of the adapter that it leaves."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from mlalign import methods, store
from mlalign.models.loading import load_vlm_from
from mlalign.objects import vocabulary
from mlalign.probes import _records
from mlalign.probes._pass import ProbePass
from mlalign.probes._probe import RARE
from mlalign.recipe import from_dict
from mlalign.train import __main__ as train
from mlalign.train import launch
from tests.probes import tiny
from tests.train.pairs import make_pairs

STEPS, EVERY = 4, 2
PASSES = [0, 2, 4]
PROBES = methods.names("mlalign.probes")
RARE_PASSES = [0, 4]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pairs and a probe set."""
    folder = tmp_path_factory.mktemp("files")
    vlm = tiny.new_vlm()
    vlm.model.save_pretrained(folder / "model")
    vlm.processor.save_pretrained(folder / "model")
    store.write_preferences(folder / "pairs", make_pairs(12), {})
    _records.save(folder / "probe_set", tiny.records(3))
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
        raw["probes"] = {"methods": PROBES, "every": EVERY, "records": 3, "batch_size": 2}
    return raw


def weights(run: Path, arm: str) -> dict[str, torch.Tensor]:
    return load_file(run / arm / "adapter" / "adapter_model.safetensors")


def check(folder: Path, files: Path) -> None:
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
    assert not (folder / "runs/on/events.jsonl").read_text().count("probe disabled")
    for probe in built():
        for step in RARE_PASSES if probe.tier == RARE else PASSES:
            assert stored(folder / "runs/on", probe.name, step), (probe.name, step)
    drift = {row["step"]: row["drift/rms/response"] for row in rows if "drift/cka/image" in row}
    assert drift[0] == 0 and drift[4] > drift[2] > 0
    check_readings(folder / "runs/on", files)


def built() -> list[Any]:
    return [methods.find("mlalign.probes", name)() for name in PROBES]


def stored(run: Path, probe: str, step: int) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Readings of one probe by what they are of."""
    rows = pq.read_table(run / f"probes/first/{probe}-{step}.parquet").to_pylist()
    return {tuple(row[name] for name in KEY): row for row in rows}


KEY = ("probe", "metric", "side", "record", "layer", "head", "neuron", "group")


def check_readings(run: Path, files: Path) -> None:
    """The last pass against one process over the adapter that training left."""
    vlm = load_vlm_from(files / "model", dtype="float32")
    vlm.model = PeftModel.from_pretrained(vlm.model, run / "first/adapter").eval()
    records = _records.load(files / "probe_set")
    alone = ProbePass(vlm, records, built(), vocabulary("microworld"), 2)
    readings = alone.run(STEPS)
    remembering = set(alone.remembered())
    compared: dict[str, int] = {}
    tables: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for reading in readings:
        # Against the pass before: there is none here.
        if reading.probe in remembering:
            continue
        if reading.probe not in tables:
            tables[reading.probe] = stored(run, reading.probe, STEPS)
        there = tables[reading.probe][tuple(getattr(reading, name) for name in KEY)]
        for field in ("value", "lo", "hi"):
            one, other = getattr(reading, field), there[field]
            other = math.nan if other is None else other
            assert one == pytest.approx(other, rel=1e-5, abs=1e-5, nan_ok=True), (field, reading)
        compared[reading.probe] = compared.get(reading.probe, 0) + 1
    assert len(compared) >= len(PROBES) - 3 and min(compared.values()) > 5, compared


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
    check(tmp_path, files)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.long), 3])
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
    check(tmp_path, files)
