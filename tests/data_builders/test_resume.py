"""Builds that are stopped: the same bytes afterwards, no finished chunk redone, flat memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_builders import _identity, engine
from tests.data_builders import _killed

REPOSITORY = Path(__file__).parents[2]


def run(code: list[str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, *code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def trials(which: str, folder: Path, sent: str, chosen: str):
    lines = run(["-m", "tests.data_builders._killed", which, str(folder), sent, chosen])
    first, *others = (json.loads(line) for line in lines)
    assert first["beside"] == ["out"] and first["inside"] == ["manifest.json", "pairs.parquet"]
    return first, others


def same(trial, first):
    for key in ("sha256", "manifest", "beside", "inside"):
        assert trial[key] == first[key], (trial["plan"], key)


def test_killed_at_every_moment_the_bytes_are_the_same(tmp_path):
    first, others = trials("fake", tmp_path, "SIGKILL", "all")
    kinds = {"build_many", "writestr", "fsync", "replace", "rename", "unlink", "write_table"}
    assert kinds <= set(first["moments"])
    assert len(others) == len(first["moments"]) > 60
    size = _killed.SMALL
    phase_two = first["moments"].index("write_table")
    for trial in others:
        same(trial, first)
        assert trial["signals"] == [9]
        if trial["plan"][0] > phase_two and trial["journal"]:
            assert trial["called"] == [], "a finished chunk was built again"
        elif trial["journal"]:
            rest = _killed.records(size * size, 0, size * trial["finished_chunks"][0])
            assert trial["called"] == [r.id for r in rest if not r.id.startswith("bad")]
    assert {t["finished_chunks"][0] for t in others} >= set(range(size + 1))


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT"])
def test_signals_that_ask_leave_a_build_to_go_on_with(tmp_path, sent):
    first, others = trials("fake", tmp_path, sent, "30%;60%,30%;write_table;rename")
    for trial in others:
        same(trial, first)
        assert trial["finished_chunks"][0] > 0 and trial["journal"]
    assert 0 < len(others[0]["called"]) < _killed.SMALL**2


def test_povid_stopped_again_and_again(tmp_path):
    first, others = trials(
        "povid", tmp_path, "SIGKILL", "3%;20%,20%,20%;50%;70%,40%;write_table;rename;99%"
    )
    assert first["manifest"]["pairs"] > 20
    for trial in others:
        same(trial, first)
        assert set(trial["signals"]) == {9}


def build(tmp_path, builder=None, examples=None, **more):
    given = {"out_folder": tmp_path / "out", "max_skipped": 0.2, "about": {"seed": 3}, **more}
    examples = examples or (lambda start: _killed.records(60, 500, start))
    return engine.build(builder or _killed.Fake(), examples, **given)


def stopped(tmp_path, after: int = 3, **more):
    """A build that is interrupted in the chunk after the first ``after``."""

    def examples(start):
        yield from _killed.records(8 * after + 4, 500, start)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, examples=examples, **more)
    assert len(list((tmp_path / "out.partial").glob("chunk-*.zip"))) == after


def test_the_source_is_asked_from_where_the_build_goes_on(tmp_path, capsys):
    stopped(tmp_path)
    assert "stopped; 24 records" in capsys.readouterr().err
    asked = []

    def examples(start):
        asked.append(start)
        return _killed.records(60, 500, start)

    manifest = build(tmp_path, examples=examples)
    assert asked == [24] and manifest["records"] == 60
    assert "going on; 24 records" in capsys.readouterr().err
    # An iterable that cannot begin later is read from its beginning.
    whole = build(tmp_path / "list", examples=list(_killed.records(60, 500)))
    assert whole["sha256"] == manifest["sha256"]
    assert whole["records_per_second"] == pytest.approx(60 / whole["seconds"], rel=0.2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: {"builder": _killed.Fake(chunk=4)}, "chunk: 8 -> 4"),
        (lambda m: {"about": {"seed": 4}}, "about.seed: 3 -> 4"),
        (
            lambda m: {"about": {"seed": 3, "model": {"weights": "ab"}}},
            'about.model: null -> {"weights": "ab"}',
        ),
        (lambda m: {"builder": _renamed()}, 'builder: "fake" -> "other"'),
        (lambda m: m.setattr(_identity, "_code", lambda builder: "new") or {}, '-> "new"'),
    ],
)
def test_a_journal_of_another_build_is_refused_and_kept(tmp_path, monkeypatch, change, named):
    stopped(tmp_path)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "out.partial").iterdir()}
    with pytest.raises(engine.BuildError) as error:
        build(tmp_path, **change(monkeypatch))
    assert named in str(error.value) and "out.partial" in str(error.value)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out.partial").iterdir()} == kept
    monkeypatch.undo()
    assert build(tmp_path)["records"] == 60


def _renamed():
    builder = _killed.Fake()
    builder.name = "other"
    return builder


def test_the_code_of_every_room_that_builders_use_counts():
    from tests.test_architecture import MAY

    rooms = {room.partition(".")[0] for room in _identity.ROOMS}
    assert MAY["data_builders"] <= rooms
    assert all((REPOSITORY / "mlalign" / room).exists() for room in _identity.ROOMS)


def test_a_raised_limit_uses_what_is_done(tmp_path):
    with pytest.raises(engine.BuildError, match=r"lost 5 of 60 records \(8.3%\)") as error:
        build(tmp_path, max_skipped=0.05)
    assert "5 x image is truncated (e.g. bad10, bad21, bad32)" in str(error.value)
    assert not (tmp_path / "out").exists()
    builder = _killed.Fake()
    manifest = build(tmp_path, builder, max_skipped=0.1)
    assert builder.called == []
    assert manifest["skipped"]["image is truncated"]["first_ids"] == ["bad10", "bad21", "bad32"]
    assert manifest["sha256"] == build(tmp_path / "again")["sha256"]


@pytest.mark.parametrize("where", ["chunk", "parquet"])
def test_a_full_disk_is_named_and_the_build_goes_on(tmp_path, monkeypatch, where):
    calls = 0

    def full(*args, **keys):
        nonlocal calls
        calls += 1
        if calls == 4 or where == "parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **keys)

    owner, name = (os, "fsync") if where == "chunk" else (pq.ParquetWriter, "write_table")
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(engine.BuildError, match=r"the disk is full.*Free some space"):
        build(tmp_path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    builder = _killed.Fake()
    build(tmp_path, builder)
    assert len(builder.called) < 55 if where == "chunk" else builder.called == []


def test_another_fault_of_the_system_is_itself(tmp_path):
    def examples(start):
        yield from _killed.records(20, 500, start)
        raise FileNotFoundError(errno.ENOENT, "No such file", "gone.png")

    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        build(tmp_path, examples=examples)


def test_a_damaged_chunk_is_named_and_its_removal_mends(tmp_path):
    whole = build(tmp_path / "whole")["sha256"]
    stopped(tmp_path)
    victim = tmp_path / "out.partial" / "chunk-00000001.zip"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(engine.BuildError, match=r"chunk-00000001\.zip: damaged"):
        build(tmp_path)
    victim.unlink()
    builder = _killed.Fake()
    assert build(tmp_path, builder)["sha256"] == whole
    assert builder.called[0] == "r8"


def test_a_builder_that_loses_a_pair_is_told(tmp_path):
    class Careless(_killed.Fake):
        def finish(self, candidates):
            yield from list(candidates)[1:]

    with pytest.raises(engine.BuildError, match=r"finish gave \d+ of \d+ pairs back"):
        build(tmp_path, Careless())


MEASURE = """
import sys
from pathlib import Path
from tests.data_builders import _killed

def high():
    status = Path("/proc/self/status").read_text()
    return next(int(l.split()[1]) for l in status.splitlines() if l.startswith("VmHWM"))

count, folder = int(sys.argv[1]), Path(sys.argv[2])
manifest = _killed.engine.build(
    _killed.Fake(chunk=64, share=0),
    lambda start: _killed.records(count, 20_000, start),
    out_folder=folder / "out",
    max_skipped=0.2,
)
print(high(), manifest["pairs"], (folder / "out" / "pairs.parquet").stat().st_size)
"""


def test_memory_does_not_grow_with_the_pairs(tmp_path):
    (kib_few, few, size_few), (kib_many, many, size_many) = (
        map(int, run(["-c", MEASURE, str(count), str(tmp_path / str(count))])[0].split())
        for count in (2_200, 11_000)
    )
    assert few > 1_900 and many > 9_800
    assert size_many - size_few > 10_000 * (many - few)
    assert kib_many - kib_few < 30 * 1024
