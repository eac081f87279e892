"""What is on disk is whole or asked again; several processes share a folder."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlalign.judges import _request_cache
from mlalign.judges._request_cache import RequestCache, request_key
from tests._syntax import REPOSITORY


def body(**changes: Any) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"sha256": "ab"}}
    content = [image, {"type": "text", "text": "Is there a pot?"}]
    plain = {
        "model": "m",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "temperature": 0.0,
        "seed": 1,
    }
    return plain | changes


def message(image: dict[str, Any], text: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_every_ingredient_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = [
        body(),
        body(model="n"),
        body(messages=message({"sha256": "ab"}, "Is there a pot? ")),
        body(messages=message({"sha256": "ac"}, "Is there a pot?")),
        body(messages=message({"sha256": "ab", "max_side": 40}, "Is there a pot?")),
        body(messages=body()["messages"] * 2),
        body(max_tokens=2),
        body(temperature=0.5),
        body(seed=2),
        body(logprobs=True),
        {k: v for k, v in body().items() if k != "seed"},
    ]
    keys = [request_key(b) for b in bodies] + [request_key(body(), "retrained")]
    monkeypatch.setattr(_request_cache, "LAYOUT", 2)
    keys.append(request_key(body()))
    assert len(set(keys)) == len(keys) == 13


def test_the_key_depends_on_nothing_else() -> None:
    assert request_key(dict(reversed(body().items()))) == request_key(body())
    # The same on every machine and in every version: what was paid for stays found.
    text = rb'{"body":{"model":"m","\u00e9":1.5},"layout":1,"revision":""}'
    assert request_key({"model": "m", "é": 1.5}) == hashlib.sha256(text).hexdigest()


def filled(folder: Path, entries: int = 5) -> RequestCache:
    cache = RequestCache(folder)
    for number in range(entries):
        cache.put(request_key({"n": number}), {"n": number, "text": f"Häuser\n{number}\u2028"})
    return cache


def read(folder: Path, entries: int = 5) -> tuple[list[int], RequestCache]:
    """Numbers of the entries that a new process finds."""
    cache = RequestCache(folder)
    cache.refresh()
    found = []
    for number in range(entries):
        entry = cache.get(request_key({"n": number}))
        if entry is not None:
            assert entry == {"n": number, "text": f"Häuser\n{number}\u2028"}
            found.append(number)
    return found, cache


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    cache = filled(tmp_path / "new" / "folder")
    assert [cache.get(request_key({"n": n}))["n"] for n in range(5)] == list(range(5))  # type: ignore[index]
    assert cache.get(request_key({"n": 5})) is None
    found, again = read(tmp_path / "new" / "folder", 6)
    assert found == list(range(5)) and again.damaged == [] and len(again) == 5
    assert read(tmp_path / "none")[0] == []


def test_a_file_cut_anywhere_loses_only_its_end(tmp_path: Path) -> None:
    filled(tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    assert len(ends) == 5
    for length in range(0, len(data) + 1, 7):
        path.write_bytes(data[:length])
        assert read(tmp_path)[0] == list(range(sum(end <= length for end in ends)))


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    filled(tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    start = sum(map(len, lines[:2]))
    for offset in range(0, len(lines[2]) - 1, 3):
        spoiled = bytearray(data)
        spoiled[start + offset] ^= 1
        path.write_bytes(spoiled)
        found, cache = read(tmp_path)
        # A byte that becomes a line end makes two damaged lines of one.
        assert found == [0, 1, 3, 4]
        assert cache.damaged[0] == f"{path.name}, line 3"


def test_damage_after_opening_is_not_served(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    data = bytearray(path.read_bytes())
    data[data.index(b'"n": 3') + 5] = ord("7")
    path.write_bytes(data)
    key = request_key({"n": 3})
    assert cache.get(key) is None and cache.damaged[0].startswith(path.name)
    cache.put(key, {"n": 3})
    assert cache.get(key) == {"n": 3}
    path.unlink()
    assert cache.get(request_key({"n": 1})) is None


def test_an_entry_under_another_key_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    (path,) = tmp_path.glob("*.jsonl")
    one, two = (request_key({"n": n}) for n in range(2))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0].replace(one, "x").replace("x", two, 1))
    assert read(tmp_path)[0] == []


def test_others_entries_are_taken_in(tmp_path: Path) -> None:
    mine, other = RequestCache(tmp_path), RequestCache(tmp_path)
    mine.put(request_key({"n": 0}), {"n": 0})
    other.put(request_key({"n": 1}), {"n": 1})
    assert mine.get(request_key({"n": 1})) is None
    mine.refresh()
    assert mine.get(request_key({"n": 1})) == {"n": 1}
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_half_a_line_of_another_process_is_read_when_it_is_whole(tmp_path: Path) -> None:
    filled(tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    found, cache = read(tmp_path)
    assert found == [0, 1, 2, 3]
    path.write_bytes(data)
    cache.refresh()
    assert cache.get(request_key({"n": 4})) is not None and cache.damaged == []


def test_after_a_failed_write_nothing_is_glued_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(tmp_path, 2)
    write, calls = os.write, []

    def full(handle: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(handle, data[:30])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        cache.put(request_key({"n": 2}), {"n": 2})
    assert calls[1] == calls[0] - 30
    monkeypatch.undo()
    assert cache.get(request_key({"n": 2})) is None
    cache.put(request_key({"n": 2}), {"n": 2, "text": "Häuser\n2\u2028"})
    assert read(tmp_path)[0] == [0, 1, 2]


@given(st.binary(max_size=400))
def test_no_bytes_are_served_by_chance(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    (folder / "a.jsonl").write_bytes(junk)
    cache = RequestCache(folder)
    cache.refresh()
    assert len(cache) == 0 and len(cache.damaged) == junk.count(b"\n")


WRITER = """
import sys
from mlalign.judges._request_cache import RequestCache, request_key
cache = RequestCache(sys.argv[1])
for number in range(300):
    cache.put(request_key({"n": number, "who": sys.argv[2]}), {"n": number, "pad": "x" * 3000})
"""


def test_processes_write_at_once(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), who], env=env)
        for who in "abc"
    ]
    reader = RequestCache(tmp_path)
    while any(writer.poll() is None for writer in writers):
        reader.refresh()
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    reader.refresh()
    assert reader.damaged == [] and len(reader) == 900
    for who in "abc":
        entries = [reader.get(request_key({"n": n, "who": who})) for n in range(300)]
        assert [e and e["n"] for e in entries] == list(range(300))


def test_a_fork_writes_a_file_of_its_own(tmp_path: Path) -> None:
    cache = filled(tmp_path, 2)
    child = os.fork()
    if child == 0:
        cache.put(request_key({"n": 2}), {"n": 2, "text": "Häuser\n2\u2028"})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert read(tmp_path)[0] == [0, 1, 2] and len(list(tmp_path.glob("*.jsonl"))) == 2


def test_lines_are_json(tmp_path: Path) -> None:
    filled(tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["entry"]["n"] for row in rows] == list(range(5))
    assert all(set(row) == {"key", "sha256", "entry"} for row in rows)
