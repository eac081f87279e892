"""RLHF-V and RLAIF-V: Parquet with the images inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_builders.sources import rlhf_v as source
from data_builders.sources._released import SourceError
from data_builders.sources.rlaif_v import METHOD as RLAIF_V
from data_builders.sources.rlhf_v import METHOD as RLHF_V
from tests.data_builders.sources.released import (
    check_details,
    fixture,
    pairs,
    parquet,
    pictures,
    png,
    read,
    skips,
)


def rlhf_v(file: Path, **settings: Any) -> Any:
    return RLHF_V(RLHF_V.Settings(path=str(file), **settings))


@pytest.fixture
def corrections(tmp_path: Path) -> Path:
    return parquet(tmp_path / "RLHF-V-Dataset.parquet", fixture("rlhf_v_rows.json"))


def test_rlhf_v_rows(corrections: Path, tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", "empty")
    records = read(rlhf_v(corrections, images=str(images)))
    made = pairs(records)
    assert list(made) == ["rlhf_v-0", "rlhf_v-1", "rlhf_v-1.2"]
    pair = made["rlhf_v-0"]
    assert pair.prompt == "What is shown?"
    assert pair.image.read() == png(1) and pair.image.path == "0.jpg"
    assert made["rlhf_v-1"].prompt == "Who is there?"
    assert made["rlhf_v-1"].image.read() == png(2)
    assert pair.origin["split"] == {"model": "Muffin", "type": "detailed_description"}
    assert pair.origin["dataset"] == "llava1.5" and pair.origin["row"] == "0"
    edits = {
        (s.side, (pair.chosen if s.side == "chosen" else pair.rejected)[s.start : s.end])
        for s in pair.segments
    }
    assert edits == {("chosen", "red"), ("rejected", "blue")}
    assert {(s.label, s.weight) for s in pair.segments} == {("edit", 1.0)}
    assert skips(records) == {
        "rlhf_v-2": "text: is not JSON",
        "rlhf_v-3": "text: is list, not a mapping",
        "rlhf_v-4": "rejected: missing",
        "rlhf_v-5": "rejected: is int, not text",
        "rlhf_v-6": "rejected: equal to chosen, so the pair prefers nothing",
        "rlhf_v-7": "image file is not an image",
        "rlhf_v-8": "image cannot be read",
        "rlhf_v-9": "text: missing",
    }
    check_details(records, corrections)


def test_rlhf_v_as_released_compares_the_row(corrections: Path, tmp_path: Path) -> None:
    """What stands before the answers: image tokens, then the words of the row's question."""
    images = pictures(tmp_path / "images", "empty")
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "edit_segments", lambda *a, before, **k: seen.append(before) or ())
        read(rlhf_v(corrections, images=str(images), as_released=True, image_tokens=3))
        rows, _ = len(seen), read(rlhf_v(corrections, images=str(images)))
    assert seen[0] == ["<image>"] * 3 + ["What", "is", "shown", "?"]
    assert seen[rows:] == [None] * rows


def test_rlhf_v_one_sided_edits(corrections: Path, tmp_path: Path) -> None:
    images = str(pictures(tmp_path / "images", "empty"))
    plain = pairs(read(rlhf_v(corrections, images=images)))["rlhf_v-1"]
    marked = pairs(read(rlhf_v(corrections, images=images, one_sided=True)))["rlhf_v-1"]
    assert plain.segments == ()
    assert [marked.rejected[s.start : s.end] for s in marked.segments] == ["and two cats"]


def test_rlhf_v_image_path_where_bytes_are_missing(corrections: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"images: rlhf_v-8 names its image 'RLHF-V/8\.jpg'"):
        read(rlhf_v(corrections))
    images = pictures(tmp_path / "images", "RLHF-V/8.jpg")
    pair = pairs(read(rlhf_v(corrections, images=str(images))))["rlhf_v-8"]
    assert pair.image.read() == png(0)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number, rows in fixture("rlaif_v_shards.json").items():
        parquet(tmp_path / "data" / f"RLAIF-V-Dataset_{number}.parquet", rows)
    return tmp_path / "data"


def rlaif_v(folder: Path, **settings: Any) -> Any:
    return RLAIF_V(RLAIF_V.Settings(path=str(folder), **settings))


def test_rlaif_v_rows(shards: Path) -> None:
    records = read(rlaif_v(shards))
    made = pairs(records)
    assert list(made) == [f"rlaif_v-test_20240101-{n}" for n in range(3)]
    pair = made["rlaif_v-test_20240101-0"]
    assert (pair.prompt, pair.chosen) == ("What is it?", "A cup.")
    assert pair.rejected == "A cup and a spoon."
    assert pair.image.read() == png(0) and pair.segments == ()
    assert pair.origin["split"]["labeler"] == "LLaVA-NeXT-34B"
    assert pair.origin["dataset"] == "COCO"
    # What is said about a pair may be broken without the pair being so.
    assert made["rlaif_v-test_20240101-1"].origin["split"] == "{broken"
    assert skips(records) == {
        "rlaif_v-test_20240101-3": "chosen: missing",
        "rlaif_v-test_20240101-4": "chosen: empty",
        "rlaif_v-test_20240101-5": "image is truncated or damaged",
    }
    check_details(records[3:], shards / "RLAIF-V-Dataset_007.parquet")


def test_rlaif_v_shards_are_an_iteration(shards: Path) -> None:
    assert [f.name for f in rlaif_v(shards, shards=(7,)).files()] == ["RLAIF-V-Dataset_007.parquet"]
    assert list(pairs(read(rlaif_v(shards, shards=(7, 0))))) == [
        f"rlaif_v-test_20240101-{n}" for n in (2, 0, 1)
    ]
    with pytest.raises(SourceError, match=r"no file of shard 6, 8 in .*There are: 0, 7"):
        read(rlaif_v(shards, shards=(6, 7, 8)))


def test_rlaif_v_fetches_only_its_shards(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, **told: Any) -> str:
        asked.append((name, told))
        return str(shards)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    source = rlaif_v(Path("openbmb/RLAIF-V-Dataset"), shards=(0, 7), revision="abc")
    assert len(read(source)) == 6 and len(read(source, limit=1)) == 1
    assert asked == [
        (
            "openbmb/RLAIF-V-Dataset",
            {"repo_type": "dataset", "revision": "abc", "allow_patterns": [f"*{n}*.parquet"]},
        )
        for n in ("000", "007")
    ]
