"""What all released sets share: where files are found, rows that stream, files that are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_builders.sources import _released as rl
from data_builders.sources.povid import METHOD as POVID
from data_builders.sources.rlhf_v import METHOD as RLHF_V
from mlalign import methods
from mlalign.recipe import RecipeError, configure
from mlalign.sections import MethodRef
from tests.data_builders.sources.released import FIXTURES, fixture, parquet, pictures, read

RELEASED = ("ha_dpo", "llama_factory", "llava_rlhf", "mdpo", "ms_swift", "povid", "rlaif_v",
            "rlhf_v", "trl", "vigor", "vlfeedback")  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_each_source_by_its_name(name: str) -> None:
    method = methods.find("data_builders.sources", name)
    assert method.name == name and method.language == "english"
    assert callable(method.pairs) and not hasattr(method, "examples")
    with pytest.raises(RecipeError, match="imagez"):
        configure(method, MethodRef(name=name, path="x", imagez="y"), "data.pairs.a")


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = tmp_path / "snapshot"
    file = parquet(release / "RLHF-V-Dataset.parquet", fixture("rlhf_v_rows.json")[:2])
    # What a snapshot holds beside the release.
    (release / ".cache").mkdir()
    (release / ".cache" / "x.parquet").write_bytes(b"")
    told: dict[str, Any] = {}

    def fetch(name: str, **settings: Any) -> str:
        told.update(settings, name=name)
        return str(release)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    source = RLHF_V(RLHF_V.Settings(path="openbmb/RLHF-V-Dataset", revision="main"))
    assert not told, "nothing is fetched before it is read"
    assert source.files() == [file]
    assert told == {
        "name": "openbmb/RLHF-V-Dataset",
        "repo_type": "dataset",
        "revision": "main",
        "allow_patterns": ["*.parquet", "*.jsonl", "*.json"],
    }
    assert [r.id for r in read(source)] == ["rlhf_v-0", "rlhf_v-1"]
    print_ = source.fingerprint()
    assert print_["path"] == "openbmb/RLHF-V-Dataset" and print_["revision"] == "main"
    assert len(print_["files_sha256"]["RLHF-V-Dataset.parquet"]) == 64


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(rl.SourceError, match=r"owner/name-1 is not on this machine.*offline"):
        rl.locate("owner/name-1", ("*.json",))
    with pytest.raises(rl.SourceError, match="neither a file nor a folder here, nor a data set id"):
        rl.locate("/no/such/folder", ("*.json",))


def test_folder_without_the_release(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(rl.SourceError, match=r"holds none of \*\.parquet, \*\.json"):
        rl.locate(str(tmp_path), ("*.parquet", "*.json"))


def test_broken_files_are_named(tmp_path: Path) -> None:
    cut = tmp_path / "cut.parquet"
    whole = parquet(tmp_path / "whole.parquet", fixture("rlhf_v_rows.json")[:3]).read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.json").write_text('[{"id": 1}, {"id"')
    (tmp_path / "one.json").write_text('{"id": 1}')
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    for name, said in (
        ("cut.parquet", "damaged or not Parquet"),
        ("cut.json", "is not JSON in UTF-8"),
        ("one.json", "holds one dict, not a list"),
        ("latin.json", "is not JSON in UTF-8"),
    ):
        with pytest.raises(rl.SourceError, match=rf"{name}: {said}"):
            list(rl.rows_of(tmp_path / name))


def test_damage_inside_a_parquet_file_says_how_far_it_was_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    table = pa.table({"id": [str(n) for n in range(4000)], "text": ["x" * 50] * 4000})
    pq.write_table(table, file, row_group_size=1000, compression="none", use_dictionary=False)
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = b"\xff" * 4000
    file.write_bytes(bytes(data))
    rows = []
    with pytest.raises(rl.SourceError, match=rf"{file.name}: damaged .* after row \d+ .*Fetch it"):
        for row in rl.rows_of(file):
            rows.append(row.number)
    assert rows == list(range(1, len(rows) + 1)) and len(rows) < 4000


def test_parquet_is_not_held_in_memory(tmp_path: Path) -> None:
    file, groups, size = tmp_path / "rows.parquet", 24, 1 << 20
    schema = pa.schema({"data": pa.binary()})
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(groups):
            rows = [{"data": bytes(size // 8)} for _ in range(8)]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in rl.rows_of(file))
    assert most < 6 * size < groups * size


def test_json_lines_stream_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"id": 1}\n\n\xff\xfe\n{"id": 2}\n' + b"[" * 100_000 + b"\n")
    rows = list(rl.rows_of(file))
    assert [(row.number, row.value, bool(row.fault)) for row in rows] == [
        (1, {"id": 1}, False),
        (3, None, True),
        (4, {"id": 2}, False),
        (5, None, True),
    ]


def test_rows_are_read_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "many.jsonl"
    row = {key: value for key, value in fixture("povid.json")[0].items() if key != "id"}
    file.write_text((json.dumps(row) + "\n") * 500)
    images = pictures(tmp_path / "coco", "000000000025.jpg")
    opened = []
    monkeypatch.setattr("data_builders.sources._fields.open_image", lambda *a: opened.append(a))
    source = POVID(POVID.Settings(path=str(file), images=str(images)))
    stream = source.pairs(None, 0)
    for _ in range(3):
        next(stream)
    assert len(opened) == 3
    assert len(list(source.pairs(20, 0))) == 20


def test_repeated_keys_get_ids_of_their_own(tmp_path: Path) -> None:
    rows = [rl.Row(file=tmp_path, number=n, value={"id": key}) for n, key in
            enumerate(["a", "a", "b", "a", "", None, 7, True], start=1)]  # fmt: skip
    ids: list[str] = []

    def make(row: dict[str, Any], record_id: str) -> list[Any]:
        ids.append(record_id)
        return []

    list(rl.read("s", rows, lambda row: row["id"], make, None))
    assert ids == ["s-a", "s-a.2", "s-b", "s-a.3", "s-row5", "s-row6", "s-7", "s-row8"]


def test_fixtures_are_as_small_as_rows_written_by_hand() -> None:
    files = [p for p in FIXTURES.rglob("*") if p.is_file()]
    assert len(files) >= 12 and sum(p.stat().st_size for p in files) < 60_000
