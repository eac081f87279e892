"""When the passes run, what they log and keep, and what a failing probe does to training."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes import _pass, _records
from mlalign.probes._pass import ProbeError, ProbePass
from mlalign.probes._probe import RARE, Watch
from mlalign.recipe import RecipeError, from_dict
from mlalign.runlog import RunLog, probe_faults, read_lines
from mlalign.train import cadence, probe_callback
from mlalign.train.cadence import Cadence, steps_between
from mlalign.train.probe_callback import ProbeCallback, build, from_recipe
from tests.probes import tiny
from tests.probes.test_pass import Broken


class Counter(tiny.Probe):
    """Reads how many passes it has seen; carries the number from pass to pass."""

    name = "counter"
    prefix = "probe/counter"
    headline = "adapted"

    def __init__(self, tier: str = "every", fails_at: int = -1) -> None:
        self.tier = tier
        self.fails_at = fails_at
        self.seen = 0

    def watch(self, vlm: Any, batch: Any) -> Watch:
        return Watch(batch)

    def compare(self, batch: Any, before: Watch, after: Watch) -> list[Any]:
        return [None] * len(batch.items)

    def readings(self, step: int, *rest: Any) -> list[ProbeReading]:
        if step == self.fails_at:
            raise KeyError("planted")
        self.seen += 1
        fixed = {"step": step, "probe": self.name, "side": "adapted", "record": ""}
        return [ProbeReading(metric="seen", value=float(self.seen), **fixed)]

    def remember(self) -> dict[str, np.ndarray]:
        return {"seen": np.array([self.seen])}

    def recall(self, kept: dict[str, np.ndarray]) -> None:
        self.seen = int(kept["seen"][0])


def train(callback: ProbeCallback, start: int, stop: int, planned: int | None = None) -> None:
    """What the Trainer calls, without the training; stopped short where ``planned`` is more."""
    state = SimpleNamespace(global_step=start, max_steps=planned or stop)
    callback.on_train_begin(None, state, None)
    for step in range(start + 1, stop + 1):
        state.global_step = step
        callback.on_step_end(None, state, None)
        if callback.save_every and step % callback.save_every == 0:
            folder = callback.log.folder / callback.arm / f"checkpoints/checkpoint-{step}"
            folder.mkdir(parents=True)
    if stop == state.max_steps:
        callback.on_train_end(None, state, None)


@cache
def vlm_with_lora() -> VLM:
    return tiny.with_lora(tiny.new_vlm())


def new_pass(methods: list, strict: bool = False) -> ProbePass:
    return tiny.new_pass(vlm_with_lora(), methods, count=2, strict=strict)


@pytest.fixture
def no_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """None run: these tests are of when passes run, and ``Counter`` looks at no forward."""
    monkeypatch.setattr(_pass, "run_forwards", lambda *_: [])


def new_callback(folder: Path, every: int, methods: list, **keys: Any) -> ProbeCallback:
    return ProbeCallback(new_pass(methods), Cadence(every=every), RunLog(folder), "arm", **keys)


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("every", "start", "stop", "steps"),
    [(0, 0, 5, [0, 5]), (2, 0, 5, [0, 2, 4, 5]), (2, 0, 4, [0, 2, 4]), (2, 3, 5, [4, 5])],
    ids=["ends only", "every 2", "last step once", "resumed"],
)
@pytest.mark.usefixtures("no_forwards")
def test_when_it_runs(tmp_path: Path, every: int, start: int, stop: int, steps: list[int]) -> None:
    callback = new_callback(tmp_path, every, [])
    train(callback, start, stop)
    assert steps_of(tmp_path) == steps
    assert callback.passes == len(steps) and callback.last_step == stop


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"save_every": 4}, [0, 4, 7]),
        ({"save_every": 3}, [0, 6, 7]),
        ({}, [0, 7]),
        ({"rare": False, "save_every": 4}, []),
    ],
)
@pytest.mark.usefixtures("no_forwards")
def test_when_the_rare_tier_runs(tmp_path: Path, keys: dict[str, Any], steps: list[int]) -> None:
    """Start, end, and passes at checkpoints; step 3 has a checkpoint but no pass."""
    train(new_callback(tmp_path, 2, [Counter(RARE)], **keys), 0, 7)
    found = [r["step"] for r in read_lines(tmp_path / "metrics.jsonl") if "probe/counter/seen" in r]
    assert found == steps
    files = sorted(int(f.stem.split("-")[1]) for f in tmp_path.glob("probes/arm/*.parquet"))
    assert files == steps


class Clock:
    """Two seconds a step, three a pass, ten the first pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        for module in (cadence, probe_callback):
            monkeypatch.setattr(module, "now", lambda: self.time)
        real = ProbePass.run

        def timed(probes: ProbePass, step: int, rare: bool = True) -> Any:
            self.time += 10.0 if step == 0 else 3.0
            return real(probes, step, rare)

        monkeypatch.setattr(ProbePass, "run", timed)
        tick = Cadence.tick

        def ticked(this: Cadence) -> None:
            self.time += 2.0
            tick(this)

        monkeypatch.setattr(Cadence, "tick", ticked)


@pytest.mark.usefixtures("no_forwards")
def test_a_share_becomes_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    callback = ProbeCallback(new_pass([]), Cadence(share=0.1), RunLog(tmp_path), "arm")
    train(callback, 0, 35, planned=40)
    # 3 seconds in (3 + 14 x 2) are 9.7 %; in (3 + 13 x 2) they would be 10.3 %.
    assert callback.cadence.every == 14
    assert steps_of(tmp_path) == [0, 4, 14, 28]
    facts = json.loads((tmp_path / "manifest.json").read_text())["probes"]["arm"]
    assert facts == {
        "every": 14,
        "share": 0.1,
        "timed_pass": 4,
        "step_seconds": 2.0,
        "pass_seconds": 3.0,
    }
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert event["event"] == "probe cadence" and event["every"] == 14

    # Resumed before the timed pass: it runs again, and nothing is decided anew.
    log = RunLog(tmp_path)
    log.rewind("arm", 2)
    again = ProbeCallback(new_pass([]), Cadence(share=0.1), log, "arm")
    train(again, 2, 30)
    assert again.cadence.every == 14 and steps_of(tmp_path) == [0, 4, 14, 28, 30]


@pytest.mark.usefixtures("no_forwards")
def test_a_run_too_short_to_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    callback = ProbeCallback(new_pass([]), Cadence(share=0.1), RunLog(tmp_path), "arm")
    train(callback, 0, 4)
    assert steps_of(tmp_path) == [0, 4] and callback.cadence.every is None


def test_the_cadence_of_every_rank_is_the_main_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cadence, "from_main", lambda value: (99, 1.0, 1.0))
    mine = Cadence(share=0.5, step_seconds=1.0)
    mine.decide(4, 1.0)
    assert mine.every == 99


@pytest.mark.parametrize(("seconds", "share", "every"), [(49.0, 0.02, 2401), (0.01, 0.5, 1)])
def test_steps_between(seconds: float, share: float, every: int) -> None:
    assert steps_between(seconds, 1.0, share) == every
    assert seconds / (seconds + every) <= share


@pytest.mark.parametrize(
    ("cadence_of", "key"), [({"every": 3}, "every"), ({"share": 0.1}, "share")]
)
@pytest.mark.usefixtures("no_forwards")
def test_another_cadence_is_refused_on_the_way(
    tmp_path: Path, cadence_of: dict[str, Any], key: str
) -> None:
    train(new_callback(tmp_path, 2, []), 0, 4, planned=8)
    other = ProbeCallback(new_pass([]), Cadence(**cadence_of), RunLog(tmp_path), "arm")
    with pytest.raises(ValueError, match=f"probes.{key} is .* but arm began with"):
        train(other, 4, 8)


@pytest.mark.usefixtures("no_forwards")
def test_a_resumed_run_carries_on(tmp_path: Path) -> None:
    """Stopped at step 7 and resumed from the checkpoint at 4: as if it had never stopped."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(new_callback(whole, 2, [Counter()], save_every=4), 0, 9)
    train(new_callback(cut, 2, [Counter()], save_every=4), 0, 7, planned=9)
    log = RunLog(cut)
    log.rewind("arm", 4)
    assert sorted(f.name for f in cut.glob("probes/arm/*.parquet")) == [
        "counter-0.parquet",
        "counter-2.parquet",
        "counter-4.parquet",
    ]
    assert log.remembered_steps("arm") == [2, 4]
    (cut / "arm/checkpoints/checkpoint-4").rename(cut / "aside")
    train(new_callback(cut, 2, [Counter()], save_every=4), 4, 9)
    seen = [
        [(r["step"], r["probe/counter/seen"]) for r in read_lines(folder / "metrics.jsonl")]
        for folder in (whole, cut)
    ]
    assert seen[0] == seen[1] == [(0, 1), (2, 2), (4, 3), (6, 4), (8, 5), (9, 6)]


@pytest.mark.usefixtures("no_forwards")
def test_what_is_kept_for_checkpoints(tmp_path: Path) -> None:
    """To go on from a checkpoint, and to read it again: its own pass, and the one before it."""
    train(new_callback(tmp_path, 1, [Counter()], save_every=4), 0, 9)
    assert RunLog(tmp_path).remembered_steps("arm") == [3, 4, 7, 8, 9]


def test_a_full_model_is_read_against_its_frozen_copy_again(tmp_path: Path) -> None:
    """Without an adapter the base is what the model was at step 0, also in a resumed run."""
    reliance = build(from_dict(raw(tmp_path)).probes.methods)
    vlm, start = tiny.new_vlm(seed=1), tiny.new_vlm(seed=0)
    probes = tiny.new_pass(vlm, reliance, count=2)
    log = RunLog(tmp_path)
    resumed = ProbeCallback(probes, Cadence(every=5), log, "arm")
    resumed.reference = start.model
    train(resumed, 4, 5)
    vlm = tiny.new_vlm(seed=0)
    expected = tiny.new_pass(vlm, reliance, count=2)
    expected.run(0)
    vlm.model = tiny.new_vlm(seed=1).model
    values = [r.value for r in expected.run(5)]
    table = pq.read_table(tmp_path / "probes/arm/image_reliance-5.parquet")
    np.testing.assert_allclose(table["value"].to_numpy(), values, rtol=1e-6)


def test_a_failing_probe_is_recorded_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reliance = build(from_dict(raw(tmp_path)).probes.methods)[0]
    callback = new_callback(tmp_path, 1, [Broken("compare"), Counter(fails_at=1), reliance])
    train(callback, 0, 2)
    first, second = (e for e in read_lines(tmp_path / "events.jsonl") if "probe" in e)
    assert first["event"] == "probe disabled" and first["probe"] == "broken"
    assert "planted" in first["error"] and (second["probe"], second["step"]) == ("counter", 1)
    assert "probe broken failed and is left out: KeyError: 'planted'" in capsys.readouterr().out
    assert callback.passes == 3
    assert (tmp_path / "probes/arm/image_reliance-2.parquet").is_file()
    assert not (tmp_path / "probes/arm/counter-1.parquet").exists()

    lines = probe_faults(tmp_path, ["arm", "other"])
    assert len(lines) == 2 and "arm: probe counter failed at step 1" in lines[1]
    file = Path(lines[1].partition("traceback: ")[2].rstrip(")"))
    assert "Traceback" in file.read_text() and "planted" in file.read_text()

    # Still left out, and still said, where the run goes on.
    again = new_callback(tmp_path, 1, [Counter()])
    train(again, 1, 2)
    assert again.probes.active == [] and probe_faults(tmp_path, ["arm"]) == lines
    # Trained anew, it has its chance again.
    train(new_callback(tmp_path, 1, [Counter()]), 0, 1)
    assert probe_faults(tmp_path, ["arm"]) == []


@pytest.mark.usefixtures("no_forwards")
def test_strict_stops_at_once_and_goes_on_when_mended(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    callback = ProbeCallback(
        new_pass([Counter(fails_at=2)], strict=True), Cadence(every=1), log, "arm"
    )
    with pytest.raises(ProbeError, match="counter: KeyError: 'planted'"):
        train(callback, 0, 4)
    assert steps_of(tmp_path) == [0, 1] and len(probe_faults(tmp_path, ["arm"])) == 1
    mended = ProbeCallback(new_pass([Counter()], strict=True), Cadence(every=1), log, "arm")
    train(mended, 1, 2)
    assert probe_faults(tmp_path, ["arm"]) == []


def raw(folder: Path) -> dict:
    return {
        "name": "run",
        "model": {"path": str(folder)},
        "data": {"pairs": {"arm": str(folder)}, "vocabulary": "microworld"},
        "train": {
            "objective": "dpo",
            "learning_rate": 1e-3,
            "batch_size": 1,
            "steps": 1,
            "save_every": 3,
        },
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
    assert not callback.probes.strict and callback.save_every == 3 and callback.rare


def test_the_section() -> None:
    def section(**probes: Any) -> Any:
        return from_dict({**raw(Path("x")), "probes": probes}).probes

    assert (section().every, section().share) == (250, None)
    assert (section(share=0.02).every, section(share=0.02).share) == (None, 0.02)
    assert section(every=None, share=None).every == 250 and section(every=0).every == 0
    with pytest.raises(RecipeError, match=r"every: 5 and share: 0\.02 exclude each other"):
        section(every=5, share=0.02)
    with pytest.raises(RecipeError, match=r"probes\.share"):
        section(share=1.0)
