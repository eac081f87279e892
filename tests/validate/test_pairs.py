"""Every planted fault is found in one run, with its row and record; a clean file has none."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mlalign import store
from mlalign.records import ImageRef, Preference
from mlalign.validate.examine import Outcome, examine
from mlalign.validate.pairs import PairsReader, edit_runs
from mlalign.validate.rows import pair_of, rows_of
from tests.train.pairs import make_pairs
from tests.validate import planted


def check(folder: Path, rows: list[Any], model: Path, *overrides: str) -> Outcome:
    file = planted.write(folder / "pairs.jsonl", rows)
    recipe = planted.recipe(folder / "recipe.yaml", file)
    return examine(recipe, [f"model.path={model}", *overrides], runs=folder / "runs")


def test_all_planted_faults_are_found_at_once(tmp_path: Path, weightless: Path) -> None:
    rows: list[Any] = planted.clean_rows(tmp_path, 60)
    expected = planted.plant(tmp_path, rows)
    rows += ["{not json", [1, 2]]
    expected += [
        (61, None, "line: is not JSON in UTF-8"),
        (62, None, "row: not a mapping of keys"),
    ]
    out = check(tmp_path, rows, weightless, f"train.max_length={planted.MAX_LENGTH}")
    assert [(f.row, f.record, f.kind) for f in out.faults] == expected
    assert {f.where for f in out.faults} == {str(tmp_path / "pairs.jsonl")}
    assert [f for f in out.faults if not f.mend] == []
    assert out.notes == []
    report = out.reports["ours"]
    planted_rows = {row for row, _, _ in expected}
    assert (report["rows"], report["usable"]) == (62, 62 - len(planted_rows))
    assert sum(report["faulty_by_reason"].values()) == len(expected)


def test_a_clean_file_has_no_fault(tmp_path: Path, weightless: Path) -> None:
    out = check(tmp_path, planted.clean_rows(tmp_path, 40), weightless)
    assert out.findings == []
    assert out.reports["ours"]["usable"] == 40


def test_parquet_rows_are_numbered_too(tmp_path: Path, weightless: Path) -> None:
    # Three batches of the reader's, so that numbers run on over them.
    pairs = make_pairs(150)
    cut = pairs[140].image.read()[:60]
    broken = ImageRef(path="cut.png", data=cut)
    changed = [*pairs[:140], Preference(**{**vars(pairs[140]), "image": broken}), *pairs[141:]]
    store.write_preferences(tmp_path / "built", changed, {})
    recipe = planted.recipe(tmp_path / "recipe.yaml", tmp_path / "built")
    out = examine(recipe, [f"model.path={weightless}"], runs=tmp_path)
    assert [(f.row, f.record, f.kind) for f in out.faults] == [
        (141, "pair-140", "image is truncated or damaged")
    ]
    assert out.faults[0].where == str(tmp_path / "built" / "pairs.parquet")


def test_faulty_rows_are_notes_where_the_recipe_leaves_them_out(
    tmp_path: Path, weightless: Path
) -> None:
    rows = planted.clean_rows(tmp_path, 10)
    rows[3]["chosen"] = ""
    # Given twice is trained on twice, whatever data.bad_records says.
    rows[5] = {**rows[0], "id": "r6"}
    out = check(tmp_path, rows, weightless, "data.bad_records=skip")
    assert [(f.row, f.level) for f in out.findings] == [(4, "note"), (6, "fault")]
    assert out.reports["ours"]["faulty_by_reason"]["chosen: empty"] == 1


def test_opposite_pairs_and_misplaced_tags_are_notes(tmp_path: Path, weightless: Path) -> None:
    rows = planted.clean_rows(tmp_path, 6)
    rows[4] = {**rows[1], "id": "r5", "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    rows[2]["prompt"] = "See <image> here."
    rows[3]["prompt"] = "<image>\nDescribe it."
    out = check(tmp_path, rows, weightless)
    assert out.faults == []
    assert [(f.row, f.key) for f in out.notes] == [(3, "prompt"), (5, "pair")]


def test_too_few_pairs_for_a_step(tmp_path: Path, weightless: Path) -> None:
    out = check(tmp_path, planted.clean_rows(tmp_path, 3), weightless, "train.batch_size=4")
    assert [(f.key, f.problem) for f in out.faults] == [
        ("train.batch_size", "3 usable pairs, fewer than a step's 4")
    ]


def test_a_file_that_is_not_there_and_one_that_is_damaged(tmp_path: Path, weightless: Path) -> None:
    recipe = planted.recipe(tmp_path / "recipe.yaml", tmp_path / "nothing.parquet")
    out = examine(recipe, [f"model.path={weightless}"])
    assert [(f.key, f.absent) for f in out.faults] == [("data.pairs.ours", True)]
    (tmp_path / "nothing.parquet").write_bytes(b"PAR1 and then nothing")
    out = examine(recipe, [f"model.path={weightless}"])
    assert [f.key for f in out.faults] == ["file", "train.batch_size"]


def test_the_report_against_counting_by_hand(tmp_path: Path, weightless: Path) -> None:
    from mlalign.sections import ModelSection
    from mlalign.validate.model import empty_vlm

    rows = planted.clean_rows(tmp_path, 7)
    rows[6]["images"] = rows[0]["images"]
    report = check(tmp_path, rows, weightless).reports["ours"]
    vlm, _ = empty_vlm(ModelSection(path=str(weightless)), "")
    assert vlm is not None
    lengths: dict[str, list[int]] = {"chosen": [], "rejected": []}
    for row in rows:
        for side in lengths:
            messages = [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}],
                },
                {"role": "assistant", "content": row[side]},
            ]
            text = vlm.processor.apply_chat_template(messages)
            # What follows the header of the answer.
            answer = text.rpartition("<|assistant|>")[2]
            lengths[side].append(len(vlm.tokenizer(answer, add_special_tokens=False).input_ids))
    for side, found in lengths.items():
        middle = sorted(found)[3]
        expected = {"mean": round(sum(found) / 7, 1), "median": middle, "max": max(found)}
        assert report[side] == expected
    longer = [c > r for c, r in zip(*lengths.values(), strict=True)]
    shorter = [c < r for c, r in zip(*lengths.values(), strict=True)]
    assert report["longer_chosen"] == round(sum(longer) / 7, 4)
    assert report["longer_rejected"] == round(sum(shorter) / 7, 4)
    assert (report["images"], report["images_shared"], report["most_pairs_of_an_image"]) == (
        6,
        1,
        2,
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "runs"),
    [
        ("a red mug on a table", "a red mug on a table", 0),
        ("a red mug on a table", "a blue mug on a table", 1),
        ("a red mug on a table", "a blue pot on a table here", 2),
        ("one two", "three four", 1),
    ],
)
def test_runs_of_words_that_differ(chosen: str, rejected: str, runs: int) -> None:
    assert edit_runs(chosen, rejected) == runs


def test_cut_completions_are_counted(tmp_path: Path, weightless: Path) -> None:
    rows = planted.clean_rows(tmp_path, 4)
    whole = check(tmp_path, rows, weightless).reports["ours"]
    limit = whole["prefix"]["max"] + 8
    out = check(tmp_path, rows, weightless, f"train.max_length={limit}")
    assert out.reports["ours"]["cut_by_max_length"] == 4 and whole["cut_by_max_length"] == 0
    assert [f.key for f in out.notes] == ["train.max_length"]


def test_images_are_not_kept(tmp_path: Path) -> None:
    padding = b"\0" * 100_000
    pairs = [
        Preference(**{**vars(pair), "image": ImageRef(data=pair.image.read() + padding)})
        for pair in make_pairs(256)
    ]
    store.write_preferences(tmp_path / "built", pairs, {})
    whole = sum(len(pair.image.read()) for pair in pairs)
    del pairs
    from mlalign.sections import TrainSection

    train = TrainSection(objective="dpo", learning_rate=1e-4, batch_size=1, steps=1)  # type: ignore[arg-type]
    reader = PairsReader("ours", None, train, objective=None, skip=False)
    tracemalloc.start()
    try:
        read = reader.read(tmp_path / "built")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read.usable == 256 and not read.findings
    # The Parquet reader hands over 64 rows at once; all of them would be 256.
    assert most < 0.6 * whole


def test_the_other_faults_of_a_row_are_found_behind_the_first(tmp_path: Path) -> None:
    row = {"images": [1], "prompt": None, "chosen": [{}, {}], "rejected": "x <image>"}
    pair, findings, has_image = pair_of(str(tmp_path / "f.jsonl"), 4, row)
    assert pair is not None and not has_image
    assert [f.key for f in findings] == ["images", "prompt", "chosen", "rejected"]
    assert {(f.row, f.record) for f in findings} == {(4, None)}


def test_row_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text('\n{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert [(number, row) for _, number, row in rows_of(file)] == [(2, {"a": 1}), (4, {"a": 2})]
    whole = tmp_path / "f.json"
    whole.write_text(json.dumps([{"a": 1}, {"a": 2}]), encoding="utf-8")
    assert [(number, row["a"]) for _, number, row in rows_of(whole)] == [(1, 1), (2, 2)]


def test_an_image_is_decoded_once_and_a_bad_one_named_for_each_pair(
    tmp_path: Path, weightless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlalign.data import reader

    opened: list[str] = []
    real = reader.open_image
    monkeypatch.setattr(
        reader, "open_image", lambda ref, name: opened.append(name) or real(ref, name)
    )
    rows = planted.clean_rows(tmp_path, 6)
    for row in rows[1:4]:
        row["images"] = rows[0]["images"]
    for row in rows[4:]:
        row["images"] = ["gone.png"]
    out = check(tmp_path, rows, weightless)
    assert opened.count("r1") == 1 and not {"r2", "r3", "r4"} & set(opened)
    assert [(f.row, f.record) for f in out.faults] == [(5, "r5"), (6, "r6")]
