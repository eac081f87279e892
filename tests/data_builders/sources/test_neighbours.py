"""Files of TRL, LLaMA-Factory and ms-swift as their users have them, bad rows among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_builders.sources._released import SourceError
from data_builders.sources.llama_factory import METHOD as LLAMA_FACTORY
from data_builders.sources.ms_swift import METHOD as MS_SWIFT
from data_builders.sources.trl import METHOD as TRL
from mlalign.records import ImageRef, Preference
from mlalign.store import write_preferences
from tests.data_builders.sources.released import check_details, pairs, pictures, png, read, skips


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path, "images/a.png", "images/b.png")


def lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_trl_rows(folder: Path) -> None:
    say = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
    parts = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    chat = {
        "prompt": [{"role": "user", "content": parts}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "This."}]}],
        "rejected": [{"role": "assistant", "content": "That."}],
    }
    rows = [
        {"images": ["images/a.png"], **say},
        {"image": "images/b.png", **chat, "id": "mine"},
        {"images": ["images/a.png", "images/b.png"], **say},
        {"images": ["images/c.png"], **say},
        {"images": [], **say},
        {"images": ["images/a.png"], "prompt": "What?", "chosen": "A cat."},
        {"images": ["images/a.png"], **say, "chosen": chat["chosen"] * 2},
    ]
    file = lines(folder / "pairs.jsonl", rows)
    records = read(TRL(TRL.Settings(path=str(file))))
    made = pairs(records)
    assert list(made) == ["trl-pairs-row1", "mine"]
    assert made["mine"].prompt == "Which?" and made["mine"].chosen == "This."
    assert made["mine"].image.read() == png(1)
    assert made["mine"].image_sha256 == made["mine"].image.sha256()
    assert made["mine"].origin["source"] == "trl"
    assert list(skips(records)) == [f"trl-pairs-row{n}" for n in range(3, 8)]
    assert skips(records)["trl-pairs-row4"] == "image cannot be read"
    assert len(read(TRL(TRL.Settings(path=str(folder))), limit=4)) == 4


def test_trl_reads_the_training_split_of_a_data_set(folder: Path) -> None:
    for split in ("train", "test"):
        image = ImageRef(path="a.png", data=png(2))
        pair = Preference(id=split, image=image, image_sha256=image.sha256(), prompt="What?",
                          chosen="A.", rejected="B.")  # fmt: skip
        write_preferences(folder / split, [pair], {})
        (folder / "data").mkdir(exist_ok=True)
        (folder / split / "pairs.parquet").rename(
            folder / "data" / f"{split}-00000-of-00001.parquet"
        )
    path = str(folder / "data")
    assert [r.id for r in read(TRL(TRL.Settings(path=path)))] == ["train"]
    assert [r.id for r in read(TRL(TRL.Settings(path=path, files="test-*")))] == ["test"]
    with pytest.raises(SourceError, match=r"holds none of dev-\*"):
        read(TRL(TRL.Settings(path=path, files="dev-*")))


def llama_row(**changed: Any) -> dict[str, Any]:
    row = {
        "conversations": [{"from": "human", "value": "<image>What?"}],
        "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."},
        "images": ["images/a.png"],
    }
    return {key: value for key, value in (row | changed).items() if value is not None}


def test_llama_factory_rows(folder: Path) -> None:
    turn = {"from": "human", "value": "<image>What?"}
    rows = [
        llama_row(),
        llama_row(images=[str(folder / "images/b.png")], system=""),
        llama_row(system="You are a cat."),
        llama_row(conversations=[turn, {"from": "gpt", "value": "A."}, turn]),
        llama_row(conversations=[{"from": "gpt", "value": "<image>What?"}]),
        llama_row(conversations=[{"from": "human", "value": "<image><image>What?"}]),
        llama_row(chosen=None),
        llama_row(rejected="A dog."),
        llama_row(images=["images/a.png"] * 2),
        llama_row(images=["images/none.png"]),
    ]
    file = lines(folder / "prefs.jsonl", rows)
    info = {
        "sft": {"file_name": "sft.json"},
        "prefs": {
            "file_name": "prefs.jsonl",
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected",
                        "images": "images"},
        },
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info))
    records = read(LLAMA_FACTORY(LLAMA_FACTORY.Settings(path=str(folder))))
    made = pairs(records)
    assert list(made) == ["llama_factory-row1", "llama_factory-row2"]
    assert made["llama_factory-row1"].prompt == "What?"
    assert [p.image.read() for p in made.values()] == [png(0), png(1)]
    assert list(skips(records).values()) == [
        "system: a system text, which a record does not have",
        "conversations: is not a list of one question",
        "conversations: is not said by human",
        "prompt: more than one <image>",
        "chosen: missing",
        "rejected: is str, not a mapping",
        "image: several images",
        "image cannot be read",
    ]
    check_details(records, file)
    # The file alone, with the default names.
    alone = read(LLAMA_FACTORY(LLAMA_FACTORY.Settings(path=str(file))))
    assert pairs(alone) == made


def test_llama_factory_names_of_columns_and_tags(folder: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "<image>What?"}],
        "good": {"role": "assistant", "content": "A cat."},
        "bad": {"role": "assistant", "content": "A dog."},
        "pictures": ["a.png"],
    }
    lines(folder / "p.jsonl", [row])
    entry = {
        "file_name": "p.jsonl",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "chosen": "good", "rejected": "bad",
                    "images": "pictures"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                 "assistant_tag": "assistant"},
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps({"p": entry, "q": entry}))
    source = {"path": str(folder), "images": str(folder / "images")}
    [pair] = read(LLAMA_FACTORY(LLAMA_FACTORY.Settings(dataset="p", **source)))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("What?", "A cat.", "A dog.")
    with pytest.raises(SourceError, match=r"dataset: not given; .* has with ranking: p, q"):
        read(LLAMA_FACTORY(LLAMA_FACTORY.Settings(**source)))
    (folder / "dataset_info.json").write_text(json.dumps({"p": entry | {"formatting": "alpaca"}}))
    with pytest.raises(SourceError, match="p is not a sharegpt file"):
        read(LLAMA_FACTORY(LLAMA_FACTORY.Settings(**source)))


def swift_row(**changed: Any) -> dict[str, Any]:
    row = {
        "messages": [
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": "A cat."},
        ],
        "rejected_response": "A dog.",
        "images": ["images/a.png"],
    }
    return {key: value for key, value in (row | changed).items() if value is not None}


def test_ms_swift_rows(folder: Path) -> None:
    user, system = {"role": "user", "content": "What?"}, {"role": "system", "content": "Be."}
    wrong = {"role": "assistant", "content": "A dog."}
    said = swift_row()["messages"]
    other = {"role": "user", "content": "Who?"}
    rows = [
        swift_row(messages=[user, said[1]]),
        swift_row(images="images/b.png", rejected_response=[wrong]),
        swift_row(rejected_response=None, rejected_messages=[user, wrong],
                  rejected_images=["images/a.png"]),
        swift_row(images=[{"path": str(folder / "images/a.png"), "bytes": None}],
                  rejected_images=["images/b.png"]),
        swift_row(messages=[system, *said]),
        swift_row(messages=said * 2),
        swift_row(messages=None),
        swift_row(rejected_response=None),
        swift_row(rejected_response=5),
        swift_row(rejected_response=None, rejected_messages=[other, wrong]),
        swift_row(images=None),
        swift_row(images=["images/none.png"]),
        "a text",
    ]  # fmt: skip
    file = lines(folder / "train.jsonl", rows)
    records = read(MS_SWIFT(MS_SWIFT.Settings(path=str(file))))
    made = list(pairs(records).values())
    assert {(p.prompt, p.chosen, p.rejected) for p in made} == {("What?", "A cat.", "A dog.")}
    assert [p.image.read() for p in made] == [png(0), png(1), png(0), png(0)]
    # The same image again is not another one.
    others = [p.rejected_image.read() if p.rejected_image else None for p in made]
    assert others == [None, None, None, png(1)]
    assert list(skips(records).values()) == [
        "messages: is not one user and one assistant message",
        "messages: is not one user and one assistant message",
        "messages: missing",
        "rejected_response: missing",
        "rejected_response: is int, not text",
        "rejected_messages: asks another question",
        "images: missing",
        "image cannot be read",
        "row: is str, not a mapping of keys",
    ]
    check_details(records, file)


def test_relative_images_of_files_in_several_folders(folder: Path) -> None:
    (folder / "more").mkdir()
    lines(folder / "train.jsonl", [swift_row()])
    lines(folder / "more" / "train.jsonl", [swift_row()])
    with pytest.raises(SourceError, match="the files lie in 2 folders"):
        read(MS_SWIFT(MS_SWIFT.Settings(path=str(folder))))
    both = read(MS_SWIFT(MS_SWIFT.Settings(path=str(folder), images=str(folder))))
    assert [r.id for r in both] == ["ms_swift-row1", "ms_swift-row1.2"]
