"""The objectives with segments and image views under ZeRO-3: as one process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_builders.edits import edit_segments
from mlalign import store
from mlalign.recipe import from_dict
from mlalign.records import Preference
from mlalign.train import launch
from mlalign.train.__main__ import main
from tests.train.pairs import make_pairs

STEPS = 6
ARMS = {
    "rlhf_v": {"name": "ddpo", "beta": 0.5, "gamma": 5.0},
    "povid": {"name": "povid", "beta": 0.1},
    "ha_dpo": {"name": "mdpo", "beta": 0.1, "image": "crop"},
}
"""Arm (a builder's name, whose pairs lie in the run folder already) -> its objective."""


def test_two_processes_train_to_the_same_losses(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = _train(tiny_llava, tmp_path / "two", 2, 3)
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    for arm, alone in _train(tiny_llava, tmp_path / "one", 1, 0).items():
        assert len(alone) == STEPS and alone[0] - alone[-1] > 0.1, arm
        assert losses[arm] == pytest.approx(alone, abs=1e-4), arm


def _pairs() -> list[Preference]:
    return [
        Preference(
            **{
                **{name: getattr(pair, name) for name in pair.__dataclass_fields__},
                "segments": edit_segments(pair.chosen, pair.rejected, one_sided=True),
            }
        )
        for pair in make_pairs(16)
    ]


def _train(model: Path, folder: Path, processes: int, zero: int) -> dict[str, list[float]]:
    """Loss at every step, by arm."""
    raw: dict[str, Any] = {
        "name": "run",
        "seed": 3,
        "model": {"path": str(model), "dtype": "float32", "adapter": {"rank": 4, "alpha": 16}},
        "data": {
            "source": {"name": "microworld"},
            "builders": [{"name": arm, "train": {"objective": o}} for arm, o in ARMS.items()],
        },
        "train": {
            "objective": {"name": "dpo", "beta": 0.1},
            "learning_rate": 4e-3,
            "batch_size": 4,
            "micro_batch_size": 2,
            "steps": STEPS,
        },
        "launch": {
            "launcher": "none" if processes == 1 else "deepspeed",
            "processes": processes,
            "zero": zero,
        },
    }
    for arm in ARMS:
        store.write_preferences(folder / "runs/run/data" / arm, _pairs(), {})
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    section = from_dict(raw).launch
    if processes == 1:
        assert main([str(file)]) == 0
        return _losses(folder)
    done = subprocess.run(
        launch.command(section, file),
        cwd=folder,
        env={**launch.environment(section), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return _losses(folder)


def _losses(folder: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (folder / "runs/run/metrics.jsonl").open()]
    return {arm: [r["loss"] for r in rows if r["arm"] == arm and "loss" in r] for arm in ARMS}
