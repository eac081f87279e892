"""The run folder's logs: typed and compact tables of readings, and what a resume drops."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from mlalign.branching.batch import ProbeReading
from mlalign.runlog import READINGS, RunLog, read_lines


def reading(step: int, metric: str = "mass", **more: Any) -> ProbeReading:
    keys = {"probe": "p", "side": "adapted", "record": "", "value": 0.5, **more}
    return ProbeReading(step=step, metric=metric, **keys)


def test_columns_are_those_of_a_reading() -> None:
    names = [field.name for field in dataclasses.fields(ProbeReading)]
    assert set(READINGS) == {"arm", *names} and len(READINGS) == 1 + len(names)


def test_what_went_in_comes_out(tmp_path: Path) -> None:
    full = reading(
        7,
        record="r-\u00e9",
        layer=31,
        head=39,
        neuron=11007,
        group="real",
        value=-1.25,
        noise=1e-7,
        lo=-2.0,
        hi=3e38,
        n=2**31 - 1,
    )
    RunLog(tmp_path).probe("arm", 7, "p", [full])
    (row,) = pq.read_table(tmp_path / "probes/arm/p-7.parquet").to_pylist()
    assert row.pop("arm") == "arm"
    for name, value in dataclasses.asdict(full).items():
        assert row[name] == (pytest.approx(value, rel=1e-7) if name in ("noise", "hi") else value)


def test_steps_probes_and_arms_are_one_table(tmp_path: Path) -> None:
    """Whatever a pass holds, the columns keep their types: a first file without any number, group
    or record, and rows that leave columns out."""
    log = RunLog(tmp_path)
    log.probe("a", 0, "p", [reading(0, value=math.nan), reading(0, "other", value=math.nan)])
    log.probe("a", 5, "p", [reading(5, record="r", layer=3, group="real", lo=0.1, hi=0.9)])
    log.probe("a", 5, "q", [{"step": 5, "probe": "q", "metric": "m", "side": "base", "value": 1}])
    log.probe("b", 5, "p", [reading(5)])
    log.probe("a", 5, "maps", [{"record": "r", "values": [1.0, 2.0]}])
    log.remember("a", 5, {"p/x": np.zeros(2)})
    log.traceback("a", "q", "Traceback")

    whole = pd.read_parquet(tmp_path / "probes")
    assert len(whole) == 5 and list(whole.columns) == list(READINGS)
    assert sorted(set(whole["arm"])) == ["a", "b"]
    frame = pd.read_parquet(tmp_path / "probes/a").sort_values(["step", "probe"])
    assert len(frame) == 4 and str(frame["value"].dtype) == "float32"
    assert str(frame["layer"].dtype) == "int16" and str(frame["neuron"].dtype) == "int32"
    last = frame.iloc[-1]
    assert (last["layer"], last["record"], last["n"]) == (-1, "", 1) and math.isnan(last["lo"])

    files = sorted(str(f) for f in (tmp_path / "probes/a").glob("*.parquet"))
    schemas = {pq.read_schema(file) for file in files}
    assert len(schemas) == 1
    loaded: Any = load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.num_rows == 4 and loaded.features["lo"].dtype == "float32"


def test_further_tables_agree_over_steps(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.probe("a", 0, "words", [{"word": "cat", "at": 1, "p": None, "values": []}])
    log.probe("a", 9, "words", [{"word": "dog", "at": 2, "p": 0.5, "values": [0.25, 0.5]}])
    frame = pd.read_parquet(tmp_path / "probes/a/_tables").sort_values("at")
    assert frame["p"].tolist()[1] == 0.5 and math.isnan(frame["p"].tolist()[0])
    assert [list(v) for v in frame["values"]] == [[], [0.25, 0.5]]
    schema = pq.read_schema(tmp_path / "probes/a/_tables/words-9.parquet")
    assert schema.field("values").type == pa.list_(pa.float32())
    assert schema.field("at").type == pa.int32()


def test_an_unknown_column_is_named(tmp_path: Path) -> None:
    rows = [{"metric": "m", "value": 1.0}, {"metric": "m", "value": 1.0, "colour": "red"}]
    with pytest.raises(ValueError, match="no column 'colour'"):
        RunLog(tmp_path).probe("a", 0, "p", rows)


def test_a_rewound_run_has_no_step_twice(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for arm in ("a", "b"):
        for step in (0, 5, 10):
            log.metrics(arm, step, {"loss": step})
            log.pairs(arm, step, [{"id": "x"}])
            log.rollouts(arm, step, [{"id": "x"}])
            log.probe(arm, step, "p-q", [reading(step)])
            log.probe(arm, step, "maps", [{"record": "r"}])
            log.remember(arm, step, {"p/x": np.array([step])})
    log.event("a", "resumed")
    log.rewind("a", 5)
    for name in ("metrics", "pairs"):
        rows = [(r["arm"], r["step"]) for r in read_lines(tmp_path / f"{name}.jsonl")]
        assert sorted(rows) == [("a", 0), ("a", 5), ("b", 0), ("b", 5), ("b", 10)]
    # What was sampled after five steps belongs to the sixth, which is taken again.
    rollouts = [r["step"] for r in read_lines(tmp_path / "rollouts.jsonl") if r["arm"] == "a"]
    assert rollouts == [0]
    frame = pd.read_parquet(tmp_path / "probes")
    assert sorted(frame[frame["arm"] == "a"]["step"]) == [0, 5]
    assert len(list((tmp_path / "probes/a/_tables").iterdir())) == 2
    assert log.remembered_steps("a") == [0, 5] and log.remembered_steps("b") == [0, 5, 10]
    assert log.remembered("a", 5)["p/x"].tolist() == [5]
    assert len(read_lines(tmp_path / "events.jsonl")) == 1

    log.rewind("b", 0, until=5)
    assert sorted(f.name for f in (tmp_path / "probes/b").glob("*.parquet")) == [
        "p-q-0.parquet",
        "p-q-10.parquet",
    ]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", enabled=False)
    log.probe("a", 0, "p", [reading(0)])
    log.remember("a", 0, {"x": np.zeros(1)})
    log.traceback("a", "p", "x")
    log.add_to_manifest("probes", "a", {"every": 1})
    log.rewind("a", -1)
    assert not (tmp_path / "run").exists()


def test_facts_join_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"seed": 1}')
    log = RunLog(tmp_path)
    log.add_to_manifest("probes", "a", {"every": 1})
    log.add_to_manifest("probes", "b", {"every": 2})
    log.add_to_manifest("probes", "a", {"every": 3})
    value = json.loads((tmp_path / "manifest.json").read_text())
    assert value == {"seed": 1, "probes": {"a": {"every": 3}, "b": {"every": 2}}}
    assert log.manifest("probes", "b") == {"every": 2} and log.manifest("probes", "c") == {}


def test_bytes_of_a_reading(tmp_path: Path) -> None:
    """A pass of LLaVA-1.5-7B's shape: per metric and side 32 x 32 heads, and 32 records by layer.
    Values are random: 4 bytes each cannot be had for less than about 3.5."""
    rng = np.random.default_rng(0)
    rows = []
    for metric in ("image_mass", "entropy", "lift"):
        for side in ("base", "adapted", "delta"):
            noise = 1e-3 if side == "delta" else math.nan
            for layer in range(32):
                for head in range(32):
                    at = {"layer": layer, "head": head, "side": side, "noise": noise}
                    rows.append(reading(0, metric, value=rng.random(), n=412, **at))
                for record in range(32):
                    at = {"layer": layer, "record": f"COCO_{record * 7919:012d}", "side": side}
                    rows.append(reading(0, metric, value=rng.random(), n=7, **at))
    RunLog(tmp_path).probe("arm", 0, "p", rows)
    size = (tmp_path / "probes/arm/p-0.parquet").stat().st_size
    assert size / len(rows) < 5
