"""The reference cache: bit-exact, durable, and everything that does not agree refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlalign.branching import reference_cache
from mlalign.branching.batch import TokenLogps
from mlalign.branching.reference_cache import ReferenceCache
from mlalign.branching.reference_key import (
    CacheError,
    CacheKey,
    StaleEntry,
    fingerprint_files,
    fingerprint_json,
    input_digest,
)

KEY = CacheKey(
    data="arm",
    model="llava",
    revision="none",
    weights="w0",
    dtype="float32",
    quantization="none",
    adapter="none",
    processor="p0",
    chat_template="t0",
)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def completion(record: str, side: str, tokens: list[int], prefix: Any = (1, 2), image: str = "i"):
    """A completion to be batched: what names it, its tokens, what it was conditioned on."""
    return record, side, tokens, input_digest(prefix, image)


def batch_of(rows: list, values: list | None = None) -> tuple[Any, list, TokenLogps]:
    """Batch (what the cache reads of one), digests and log-probs, random bits where not given."""
    width = max(len(tokens) for _, _, tokens, _ in rows)
    mask_CS = torch.tensor([[i < len(r[2]) for i in range(width)] for r in rows])
    target_CS = torch.zeros(mask_CS.shape, dtype=torch.long)
    target_CS[mask_CS] = torch.tensor([token for r in rows for token in r[2]])
    logps_CS = torch.zeros(mask_CS.shape)
    flat = None if values is None else [v for row in values for v in row]
    logps_CS[mask_CS] = -torch.rand(int(mask_CS.sum())) if flat is None else torch.tensor(flat)
    ids, sides = tuple(r[0] for r in rows), tuple(r[1] for r in rows)
    batch = SimpleNamespace(mask_CS=mask_CS, target_CS=target_CS, ids_C=ids, sides_C=sides)
    unread = {"entropy_CS": logps_CS + 7, "top1_CS": mask_CS, "mean_logit_CS": logps_CS + 7}
    logps = TokenLogps(logps_CS=logps_CS, mask_CS=mask_CS, **unread)
    return batch, [r[3] for r in rows], logps


def pair(record: str, length: int = 3, **given: Any) -> list:
    return [
        completion(record, "chosen", list(range(5, 5 + length)), **given),
        completion(record, "rejected", list(range(90, 90 + 2 * length)), **given),
    ]


def filled(folder: Path, *records: str) -> tuple[list, torch.Tensor]:
    """A cache on disk with the pairs of these records; what was put."""
    rows = [row for record in records for row in pair(record)]
    batch, digests, logps = batch_of(rows)
    with ReferenceCache.open(folder, KEY) as cache:
        assert cache.put(batch, digests, logps) == len(rows)
    return rows, logps.logps_CS


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.int32).tolist()


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*"))


ROW = st.lists(st.tuples(st.integers(0, 2**40), FLOATS), min_size=1, max_size=6)


@given(st.dictionaries(st.tuples(st.text(), st.text()), ROW, min_size=1, max_size=6), st.randoms())
@settings(max_examples=30)
def test_round_trip_is_bit_exact_in_any_order_and_company(entries: dict, random: Any) -> None:
    rows = [completion(*name, [t for t, _ in row]) for name, row in entries.items()]
    batch, digests, logps = batch_of(rows, [[v for _, v in row] for row in entries.values()])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)  # a disk's pace is not what is tested
        with ReferenceCache.open(Path(folder) / "cache", KEY) as cache:
            cache.put(batch, digests, logps)
            before = cache.get(batch, digests)
        again = ReferenceCache.open(Path(folder) / "cache", KEY, read_only=True)
        assert before is not None and bits(before.logps_CS) == bits(logps.logps_CS)
        order = random.sample(range(len(rows)), random.randint(1, len(rows)))
        other, other_digests, _ = batch_of([rows[i] for i in order])
        found = again.get(other, other_digests)
    assert found is not None and found.mask_CS is other.mask_CS
    for place, i in enumerate(order):
        expected = logps.logps_CS[i][logps.mask_CS[i]]
        assert bits(found.logps_CS[place][found.mask_CS[place]]) == bits(expected)
    assert not found.logps_CS[~found.mask_CS].any()
    assert not (found.entropy_CS.any() or found.top1_CS.any() or found.mean_logit_CS.any())


def test_resume_sees_all_and_what_is_missing_is_a_miss(tmp_path: Path) -> None:
    rows, logps_CS = filled(tmp_path / "c", "a", "b")
    cache = ReferenceCache.open(tmp_path / "c", KEY)
    batch, digests, new = batch_of([*rows, *pair("new")])
    assert len(cache) == 4 and cache.get(batch, digests) is None
    # Computed again in a batch with a miss, the entries that are there stay as they are.
    assert cache.put(batch, digests, new) == 2 and len(cache) == 6
    found = cache.get(batch, digests)
    assert found is not None and bits(found.logps_CS[:4]) == bits(logps_CS)
    assert bits(found.logps_CS[4:]) == bits(new.logps_CS[4:]) != bits(logps_CS[:2])


def test_an_empty_cache_is_not_false(tmp_path: Path) -> None:
    cache = ReferenceCache.open(tmp_path / "c", KEY)
    assert cache and len(cache) == 0 and cache.get(*batch_of(pair("a"))[:2]) is None


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(CacheKey)])
def test_another_key_is_refused_naming_the_field(field: str, tmp_path: Path) -> None:
    filled(tmp_path / "c", "a")
    files = {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()}
    other = dataclasses.replace(KEY, **{field: "other-value"})
    with pytest.raises(CacheError, match=f"another {field} .*other-value") as caught:
        ReferenceCache.open(tmp_path / "c", other)
    rest = {f.name for f in dataclasses.fields(CacheKey)} - {field}
    assert not [name for name in rest if f"{name} (was" in str(caught.value)]
    assert {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()} == files
    assert other.folder_in(tmp_path) != KEY.folder_in(tmp_path)
    assert dataclasses.replace(KEY).folder_in(tmp_path) == KEY.folder_in(tmp_path)
    with pytest.raises(CacheError, match=f"{field}: ''"):
        dataclasses.replace(KEY, **{field: ""})


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        (completion("b", "rejected", [1, 2, 3]), "completion"),
        (completion("b", "rejected", [90, 91, 92, 93, 94]), "completion"),
        (completion("b", "rejected", list(range(90, 96)), prefix=(1, 3)), "prefix"),
        (completion("b", "rejected", list(range(90, 96)), image="j"), "image"),
    ],
)
def test_a_changed_record_is_refused_by_name(changed: tuple, part: str, tmp_path: Path) -> None:
    filled(tmp_path / "c", "a", "b")
    cache = ReferenceCache.open(tmp_path / "c", KEY)
    # With company that is there, and with company that is missing.
    for company in (pair("a"), pair("new")):
        batch, digests, logps = batch_of([*company, changed])
        for call in (lambda b=batch, d=digests: cache.get(b, d),
                     lambda b=batch, d=digests, v=logps: cache.put(b, d, v)):  # fmt: skip
            with pytest.raises(StaleEntry, match=f"record 'b', rejected: its {part} changed"):
                call()
    assert len(cache) == 4


def test_one_record_twice_in_a_batch(tmp_path: Path) -> None:
    cache = ReferenceCache.open(tmp_path / "c", KEY)
    batch, digests, logps = batch_of([*pair("a"), *pair("a")])
    assert cache.put(batch, digests, logps) == 2
    batch, digests, logps = batch_of([*pair("b"), *pair("b", image="other")])
    with pytest.raises(StaleEntry, match="record 'b', chosen: its image changed"):
        cache.put(batch, digests, logps)
    assert len(cache) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    cache = ReferenceCache.open(tmp_path / "c", KEY)
    batch, digests, logps = batch_of([*pair("a"), *pair("bad")])
    logps.logps_CS[3, 1] = value
    with pytest.raises(FloatingPointError, match="record 'bad', rejected"):
        cache.put(batch, digests, logps)
    assert len(cache) == 0


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    cache = ReferenceCache.open(tmp_path / "c", KEY)
    batch, digests, logps = batch_of(pair("a"))
    with pytest.raises(ValueError, match="a digest for each of 2"):
        cache.get(batch, digests[:1])
    half = dataclasses.replace(logps, logps_CS=logps.logps_CS.bfloat16())
    other = dataclasses.replace(logps, mask_CS=~logps.mask_CS)
    for wrong in (half, other):
        with pytest.raises(ValueError, match="not float32, or not of this batch"):
            cache.put(batch, digests, wrong)
    with pytest.raises(ValueError, match="empty image digest"):
        input_digest([1], "")
    cache.flush()
    reader = ReferenceCache.open(tmp_path / "c", KEY, read_only=True)
    with pytest.raises(CacheError, match="opened to read"):
        reader.put(batch, digests, logps)
    with pytest.raises(CacheError, match="no reference cache"):
        ReferenceCache.open(tmp_path / "none", KEY, read_only=True)
    assert not (tmp_path / "none").exists()


def test_a_flipped_byte_or_a_cut_is_refused_by_name(tmp_path: Path) -> None:
    filled(tmp_path / "c", "a")
    (shard,) = shards(tmp_path / "c")
    whole = shard.read_bytes()
    places = range(0, len(whole), 17)
    damaged = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in places]
    damaged += [whole[:i] for i in places] + [whole[:-1], whole + b"\0"]
    for data in damaged:
        shard.write_bytes(data)
        with pytest.raises(CacheError, match="the shard is damaged") as caught:
            ReferenceCache.open(tmp_path / "c", KEY)
        assert str(shard) in str(caught.value)
    shard.write_bytes(whole)
    assert len(ReferenceCache.open(tmp_path / "c", KEY)) == 2
    shard.rename(shard.with_name("shard-1.parquet"))
    with pytest.raises(CacheError, match=r"shard-1\.parquet: the shard is damaged"):
        ReferenceCache.open(tmp_path / "c", KEY)


@pytest.mark.parametrize("step", ["fsync", "replace", "encode"])
def test_a_flush_that_fails_leaves_the_folder_as_it_was(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "c", "a")
    files = sorted(os.listdir(tmp_path / "c"))
    cache = ReferenceCache.open(tmp_path / "c", KEY)
    batch, digests, logps = batch_of(pair("b"))
    cache.put(batch, digests, logps)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        target = {"fsync": (os, "fsync"), "replace": (Path, "replace")}
        patched.setattr(*target.get(step, (reference_cache, "_encode")), full)
        with pytest.raises(OSError, match="No space left"):
            cache.flush()
    assert sorted(os.listdir(tmp_path / "c")) == files
    assert len(ReferenceCache.open(tmp_path / "c", KEY)) == 2
    cache.flush()
    again = ReferenceCache.open(tmp_path / "c", KEY).get(batch, digests)
    assert again is not None and bits(again.logps_CS) == bits(logps.logps_CS)


SCRIPT = """import os, sys; from tests.branching.test_reference_cache import write_pairs
write_pairs(sys.argv[1], sys.argv[2], lambda _: os.kill(os.getpid(), 9))"""


def write_pairs(folder: str, name: str, kill: Any = None) -> None:
    """Twelve pairs, a shard every three; ``kill`` takes the place of the second shard's fsync."""
    cache = ReferenceCache.open(folder, KEY)
    cache.flush_every = 6
    for number in range(12):
        if kill and number == 5:
            os.fsync = kill
        batch, digests, logps = batch_of(pair(f"{name}-{number}"))
        logps.logps_CS[logps.mask_CS] = -number - 1.0
        cache.put(batch, digests, logps)


def test_two_writers_and_one_of_them_killed_in_a_flush(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "c"), "killed"])
    while not shards(tmp_path / "c") and other.poll() is None:
        time.sleep(0.001)
    write_pairs(str(tmp_path / "c"), "whole")
    assert other.wait() == -9
    left = [f for f in (tmp_path / "c").iterdir() if f.name.startswith(".tmp-")]
    assert len(left) == 1, "the kill must fall between writing and renaming"
    cache = ReferenceCache.open(tmp_path / "c", KEY)
    assert len(shards(tmp_path / "c")) == 4 + 1 and len(cache) == 24 + 6
    for name, count in (("whole", 12), ("killed", 3)):
        for number in range(count):
            batch, digests, _ = batch_of(pair(f"{name}-{number}"))
            found = cache.get(batch, digests)
            assert found is not None
            assert set(found.logps_CS[found.mask_CS].tolist()) == {-number - 1.0}
    assert cache.get(*batch_of(pair("killed-3"))[:2]) is None


def test_refresh_reads_what_others_committed_and_all_agree(tmp_path: Path) -> None:
    ranks = [ReferenceCache.open(tmp_path / "c", KEY, rank=rank) for rank in (0, 1)]
    shared = batch_of(pair("shared"))
    # A sampler that fills up gives one record to two ranks, whose values differ by noise.
    for number, cache in enumerate(ranks):
        batch, digests, logps = batch_of([*pair(f"own-{number}"), *pair("shared")])
        cache.put(batch, digests, logps)
    for cache in reversed(ranks):
        cache.flush()
    assert [cache.refresh() for cache in ranks] == [1, 1] and ranks[0].refresh() == 0
    found = [c.get(*shared[:2]) for c in (*ranks, ReferenceCache.open(tmp_path / "c", KEY))]
    assert all(f is not None and bits(f.logps_CS) == bits(found[0].logps_CS) for f in found)
    assert [len(cache) for cache in ranks] == [6, 6]


def test_two_shards_that_disagree_on_a_record_are_refused(tmp_path: Path) -> None:
    runs = [ReferenceCache.open(tmp_path / "c", KEY) for _ in range(2)]
    for image, cache in zip("ij", runs, strict=True):
        cache.put(*batch_of(pair("a", image=image)))
        cache.flush()
    with pytest.raises(StaleEntry, match="record 'a', chosen: its image changed"):
        ReferenceCache.open(tmp_path / "c", KEY)


def test_a_folder_that_is_no_cache_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(CacheError, match=r"holds 'precious.txt' and no key.json"):
        ReferenceCache.open(tmp_path, KEY)
    assert os.listdir(tmp_path) == ["precious.txt"]
    for content in ("{}", "[1]", '{"format": "another"', '{"key": {"a": 1}}'):
        (tmp_path / "key.json").write_text(content)
        with pytest.raises(CacheError, match="not the key of"):
            ReferenceCache.open(tmp_path, KEY)
        assert (tmp_path / "key.json").read_text() == content


def test_a_shard_of_another_model_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "c", "a")
    other = dataclasses.replace(KEY, weights="w1")
    ReferenceCache.open(tmp_path / "other", other)
    (shard,) = shards(tmp_path / "c")
    shard.rename(tmp_path / "other" / shard.name)
    with pytest.raises(CacheError, match="written with another key"):
        ReferenceCache.open(tmp_path / "other", other)


def test_a_folder_taken_away_or_given_another_key_in_use(tmp_path: Path) -> None:
    cache = ReferenceCache.open(tmp_path / "c", KEY)
    cache.put(*batch_of(pair("a")))
    about = json.loads((tmp_path / "c" / "key.json").read_text())
    about["key"]["weights"] = "w1"
    (tmp_path / "c" / "key.json").write_text(json.dumps(about))
    with pytest.raises(CacheError, match="another weights"):
        cache.flush()
    (tmp_path / "c" / "key.json").unlink()
    (tmp_path / "c").rmdir()
    with pytest.raises(CacheError, match="removed while in use"):
        cache.flush()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("length", [100, 200])
def test_bytes_on_disk_per_pair(length: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with ReferenceCache.open(tmp_path / "c", KEY) as cache:
        for number in range(0, 1024, 64):
            rows = [
                completion(f"rlaif_v-{i:06d}-0", side, [i] * length, (i,), str(i))
                for i in range(number, number + 64)
                for side in ("chosen", "rejected")
            ]
            # Random mantissas: little for the compression to find.
            values = rng.random((len(rows), length)) * 2.0 ** rng.integers(-30, 5, (128, length))
            cache.put(*batch_of(rows, (-values).tolist()))
    on_disk = sum(file.stat().st_size for file in shards(tmp_path / "c"))
    assert cache.nbytes == on_disk and len(shards(tmp_path / "c")) == 2
    assert on_disk / 1024 == pytest.approx({100: 829, 200: 1600}[length], rel=0.01)
    table = pq.read_table(shards(tmp_path / "c")[0])
    assert table.column_names == ["id", "side", "prefix", "image", "completion", "logps"]


def test_fingerprints(tmp_path: Path) -> None:
    assert fingerprint_json({"a": 1, "b": [2]}) == fingerprint_json({"b": [2], "a": 1})
    assert fingerprint_json({"a": 1}) != fingerprint_json({"a": 2})
    with pytest.raises(ValueError):
        fingerprint_json(float("nan"))
    for folder in ("x", "y"):
        (tmp_path / folder / "part").mkdir(parents=True)
        (tmp_path / folder / "one.bin").write_bytes(b"1" * 100)
        (tmp_path / folder / "part" / "two.bin").write_bytes(b"2" * 100)
    one, two = tmp_path / "x" / "one.bin", tmp_path / "x" / "part" / "two.bin"
    before = fingerprint_files([one, two])
    assert fingerprint_files([two, one]) == before
    assert fingerprint_files((tmp_path / "y").rglob("*.bin")) == before
    was = one.stat()
    one.write_bytes(b"3" * 100)
    # Same size, and the modification time put back: only the content tells.
    os.utime(one, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert fingerprint_files([one, two]) != before
    one.write_bytes(b"2" * 100)
    two.write_bytes(b"1" * 100)
    assert fingerprint_files([one, two]) != before
    with pytest.raises(ValueError, match="no files"):
        fingerprint_files([])
