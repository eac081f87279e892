"""Reading and tokenising pairs: what is wrong is named with its file, its record and the mend."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlalign import store
from mlalign.data.collate import Collator, tokenise
from mlalign.data.reader import DataError, load_pairs
from mlalign.images import to_png
from mlalign.models.loading import load_vlm_from
from mlalign.records import ImageRef, Preference, RecordError
from tests.train.pairs import make_pairs


def test_trl_rows_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(make_pairs(1)[0].image.read())
    rows = [
        {"images": ["a.png"], "prompt": "What is it?", "chosen": "A mug.", "rejected": "A pot."},
        {
            "image": {"path": "a.png"},
            "prompt": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And?"}]}
            ],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "No."}]}],
        },
    ]
    pairs, skips = load_pairs(_jsonl(tmp_path, rows))
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        ("What is it?", "A mug.", "A pot."),
        ("And?", "Yes.", "No."),
    ]
    assert not skips


def _break(key: str, value: object) -> Callable[[dict], dict]:
    return lambda row: {**row, key: value}


FAULTS = {
    "missing image": (_break("images", ["gone.png"]), "cannot read"),
    "truncated image": (_break("images", ["cut.png"]), "truncated or damaged"),
    "not an image": (_break("images", ["text.png"]), "is not an image"),
    "no image": (_break("images", []), "0 images, but a record has exactly one"),
    "two images": (_break("images", ["a.png", "a.png"]), "2 images"),
    "equal sides": (_break("rejected", "A mug."), "equal to chosen"),
    "empty chosen": (_break("chosen", " "), "chosen: empty"),
    "empty prompt": (_break("prompt", ""), "prompt: empty"),
    "chosen of two turns": (_break("chosen", [{}, {}]), "2 messages"),
    "chosen missing": (_break("chosen", None), "missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_record_is_named_with_file_row_and_mend(fault: str, tmp_path: Path) -> None:
    png = make_pairs(1)[0].image.read()
    (tmp_path / "a.png").write_bytes(png)
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    (tmp_path / "text.png").write_text("hello")
    good = {"images": ["a.png"], "prompt": "What?", "chosen": "A mug.", "rejected": "A pot."}
    change, words = FAULTS[fault]
    file = _jsonl(
        tmp_path, [{**good, "id": "r1"}, {**change(good), "id": "r2"}, {**good, "id": "r3"}]
    )
    with pytest.raises(DataError) as caught:
        load_pairs(file)
    message = str(caught.value)
    assert str(file) in message and "'r2'" in message and words in message
    assert "data.bad_records: skip" in message and "'r1'" not in message
    pairs, skips = load_pairs(file, bad_records="skip")
    assert [p.id for p in pairs] == ["r1", "r3"] and sum(skips.values()) == 1


def test_a_second_record_of_an_id_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(make_pairs(1)[0].image.read())
    row = {"images": ["a.png"], "prompt": "What?", "chosen": "A mug.", "rejected": "A pot."}
    rows = [{**row, "id": name, "prompt": f"What {i}?"} for i, name in enumerate("abcb")]
    file = _jsonl(tmp_path, rows)
    with pytest.raises(DataError, match=r"record 'b': a record before it has this id\. Give each"):
        load_pairs(file)
    pairs, skips = load_pairs(file, bad_records="skip")
    assert [(p.id, p.prompt) for p in pairs] == [
        ("a", "What 0?"),
        ("b", "What 1?"),
        ("c", "What 2?"),
    ]
    assert skips == {"id of another record": 1}


def test_a_second_image_is_read_only_for_an_objective_that_compares_it(tmp_path: Path) -> None:
    png = make_pairs(1)[0].image.read()
    (tmp_path / "a.png").write_bytes(png)
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    row = {"images": ["a.png"], "prompt": "What?", "chosen": "A mug.", "rejected": "A pot."}
    two = {**row, "id": "two", "rejected_images": ["a.png"]}
    file = _jsonl(tmp_path, [{**row, "id": "one"}, two])
    with pytest.raises(DataError, match=r"1 faulty.*\n.*'two': has rejected_image"):
        load_pairs(file)
    with pytest.raises(DataError, match=r"1 faulty.*\n.*'one': has no rejected_image"):
        load_pairs(file, second_image=True)
    damaged = _jsonl(tmp_path, [two, {**two, "id": "cut", "rejected_images": ["cut.png"]}])
    with pytest.raises(DataError, match=r"1 faulty.*\n.*'cut'.*truncated or damaged"):
        load_pairs(damaged, second_image=True)


def test_nothing_left_and_nothing_readable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pair to train on"):
        load_pairs(_jsonl(tmp_path, []))
    with pytest.raises(store.StoreError, match=r"no \.parquet or \.jsonl"):
        load_pairs(tmp_path / "nothing")
    cut = tmp_path / "cut" / "pairs.parquet"
    cut.parent.mkdir()
    cut.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(store.StoreError, match=r"pairs\.parquet.*Build it again"):
        load_pairs(cut)


def test_pairs_survive_the_parquet_file(tmp_path: Path) -> None:
    pairs = make_pairs(3)
    store.write_preferences(tmp_path / "p", pairs, {})
    again, _ = load_pairs(tmp_path / "p")
    for before, after in zip(pairs, again, strict=True):
        assert after.image.read() == before.image.read()
        assert dataclasses.replace(after, image=before.image) == before


def test_the_parquet_file_is_one_that_trl_reads(tmp_path: Path) -> None:
    import datasets

    store.write_preferences(tmp_path / "p", make_pairs(2), {})
    table = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "p/pairs.parquet"),
        cache_dir=str(tmp_path),
        split="train",
    )
    row = table[0]
    assert row["images"][0].size == (96, 96)
    assert row["prompt"][0]["role"] == "user" and row["chosen"][0]["role"] == "assistant"


def test_an_interrupt_leaves_the_old_file_whole(tmp_path: Path) -> None:
    store.write_preferences(tmp_path / "p", make_pairs(2), {"first": True})
    before = (tmp_path / "p/pairs.parquet").read_bytes()

    def interrupted() -> object:
        yield from make_pairs(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_preferences(tmp_path / "p", interrupted(), {})  # type: ignore[arg-type]
    assert (tmp_path / "p/pairs.parquet").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p"]


def test_disk_full_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_json_atomic(tmp_path / "a.json", {"whole": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlalign.store.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write_json_atomic(tmp_path / "a.json", {"whole": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"whole": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_completion_cut_to_nothing_is_a_counted_skip(tiny_llava: Path) -> None:
    vlm = load_vlm_from(tiny_llava, dtype="float32")
    pair = make_pairs(1)[0]
    room = len(vlm.prefix_ids(pair.prompt, (96, 96)))
    done, skips = tokenise(vlm, [pair], room)
    assert not done and skips[0].reason == "no completion token left after max_length"
    assert pair.id in skips[0].detail and "train.max_length" in skips[0].detail
    done, skips = tokenise(vlm, [pair], room + 6)
    assert not skips and len(done[0].chosen) == 6
    same_start = dataclasses.replace(pair, chosen="A red kettle.", rejected="A red boat.")
    assert (
        tokenise(vlm, [same_start], room + 2)[1][0].reason
        == "chosen equals rejected after max_length"
    )


def test_layouts_hold_the_same_completions(tiny_llava: Path) -> None:
    vlm = load_vlm_from(tiny_llava, dtype="float32")
    tokenised, _ = tokenise(vlm, make_pairs(2), None)
    shared = Collator(vlm, tokenised).collate(tokenised)
    padded = Collator(vlm, tokenised, layout="padded").collate(tokenised)
    assert shared.num_pairs == padded.num_pairs == 2
    assert shared.ids_C == padded.ids_C and shared.sides_C == padded.sides_C
    assert shared.target_CS.equal(padded.target_CS)
    assert shared.input_ids_RT.shape[0] == 2 and padded.input_ids_RT.shape[0] == 4
    blank = Collator(vlm, tokenised, blank=True).collate(tokenised)
    assert not blank.images["pixel_values"].any() and shared.images["pixel_values"].any()


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from mlalign.images import open_image

    monkeypatch.setattr("mlalign.images.MAX_PIXELS", 100)
    ref = ImageRef(path="big.png", data=to_png(Image.new("RGB", (20, 20))))
    with pytest.raises(RecordError, match=r"'r9'.*big\.png.*decompression bomb"):
        open_image(ref, "r9")


def test_a_tag_for_the_image_in_an_answer_is_refused() -> None:
    pair = make_pairs(1)[0]
    with pytest.raises(RecordError, match="contains <image>"):
        Preference(
            id="x", image=pair.image, image_sha256="", prompt="a", chosen="<image> b", rejected="c"
        )


def _jsonl(folder: Path, rows: list[dict]) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_a_row_that_is_no_mapping_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(make_pairs(1)[0].image.read())
    good = {"images": ["a.png"], "prompt": "What?", "chosen": "A mug.", "rejected": "A pot."}
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (good, [1, 2])), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:2: is list, not a mapping"):
        load_pairs(file)
    pairs, skips = load_pairs(file, bad_records="skip")
    assert len(pairs) == 1 and skips == {"row is not a mapping": 1}
