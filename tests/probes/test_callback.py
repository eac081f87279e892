"""When the passes run, what they log, and what a failing probe does to training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from mlalign.probes import _records
from mlalign.recipe import from_dict
from mlalign.runlog import RunLog, read_lines
from mlalign.train.probe_callback import ProbeCallback, build, from_recipe
from tests.probes import tiny
from tests.probes.test_pass import Broken


def train(callback: ProbeCallback, start: int, stop: int) -> None:
    """What the Trainer calls, without the training."""
    state = SimpleNamespace(global_step=start)
    callback.on_train_begin(None, state, None)
    for step in range(start + 1, stop + 1):
        state.global_step = step
        callback.on_step_end(None, state, None)
    callback.on_train_end(None, state, None)


def new_callback(folder: Path, every: int, methods: list) -> ProbeCallback:
    probes = tiny.new_pass(tiny.with_lora(tiny.new_vlm()), methods, count=2, strict=False)
    return ProbeCallback(probes, every, RunLog(folder), "arm")


@pytest.mark.parametrize(
    ("every", "start", "stop", "steps"),
    [(0, 0, 5, [0, 5]), (2, 0, 5, [0, 2, 4, 5]), (2, 0, 4, [0, 2, 4]), (2, 3, 5, [4, 5])],
    ids=["ends only", "every 2", "last step once", "resumed"],
)
def test_when_it_runs(tmp_path: Path, every: int, start: int, stop: int, steps: list[int]) -> None:
    callback = new_callback(tmp_path, every, [])
    train(callback, start, stop)
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == steps
    assert callback.passes == len(steps) and callback.last_step == stop


def test_a_failing_probe_is_recorded_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reliance = build(from_dict(raw(tmp_path)).probes.methods)[0]
    callback = new_callback(tmp_path, 1, [Broken("compare"), reliance])
    train(callback, 0, 2)
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert event["event"] == "probe disabled" and event["probe"] == "broken"
    assert "planted" in event["error"]
    assert "probe broken failed and is left out: KeyError: 'planted'" in capsys.readouterr().out
    assert callback.passes == 3
    assert (tmp_path / "probes/arm/image_reliance-2.parquet").is_file()


def raw(folder: Path) -> dict:
    return {
        "name": "run",
        "model": {"path": str(folder)},
        "data": {"pairs": {"arm": str(folder)}, "vocabulary": "microworld"},
        "train": {"objective": "dpo", "learning_rate": 1e-3, "batch_size": 1, "steps": 1},
        "probes": {"methods": ["image_reliance"], "every": 1, "records": 2, "batch_size": 2},
    }


def test_from_a_recipe(tmp_path: Path) -> None:
    recipe, vlm, log = from_dict(raw(tmp_path)), tiny.new_vlm(), RunLog(tmp_path)
    with pytest.raises(ValueError, match="no probe set"):
        from_recipe(recipe, "arm", tmp_path, vlm, log)
    _records.save(tmp_path / "probe_set", tiny.records(3))
    callback = from_recipe(recipe, "arm", tmp_path, vlm, log)
    train(callback, 0, 1)
    table = pq.read_table(tmp_path / "probes/arm/image_reliance-1.parquet")
    assert len(set(table["record"].to_pylist()) - {""}) == 2
    assert set(table["arm"].to_pylist()) == {"arm"}
    assert not callback.probes.strict
