"""POVID, mDPO and LLaVA-RLHF: JSON lists whose images are files elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_builders.sources.llava_rlhf import METHOD as LLAVA_RLHF
from data_builders.sources.mdpo import METHOD as MDPO
from data_builders.sources.povid import METHOD as POVID
from mlalign.records import Preference
from tests.data_builders.sources.released import (
    FIXTURES,
    check_details,
    pairs,
    pictures,
    png,
    read,
    skips,
)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    pictures(tmp_path / "secret", "000000000025.png")
    return pictures(tmp_path / "coco", "000000000025.jpg", "COCO_train2014_000000000030.jpg")


def povid(coco: Path, **settings: Any) -> Any:
    return POVID(POVID.Settings(path=str(FIXTURES / "povid.json"), images=str(coco), **settings))


def test_povid_rows(coco: Path) -> None:
    records = read(povid(coco))
    made = pairs(records)
    assert list(made) == ["povid-000000000025", "povid-000000000030"]
    pair = made["povid-000000000025"]
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        "What is the giraffe doing?",
        "The giraffe eats leaves from a tree.",
        "The giraffe drinks from a lake beside a zebra.",
    )
    assert pair.image.read() == png(0) and pair.image_sha256 == pair.image.sha256()
    assert pair.origin == {
        "source": "povid",
        "row": "000000000025",
        "image": "000000000025.jpg",
        "turns": 1,
    }
    # The release names a subfolder; the file lies in the folder itself.
    assert made["povid-000000000030"].image.read() == png(1)
    assert skips(records) == {
        "povid-000000000025.2": "conversations: several questions",
        "povid-no-rejected": "rejected_conversations: missing",
        "povid-wrong-type": "conversations: is int, not text",
        "povid-two-images": "image: several images",
        "povid-two-tags": "conversations: more than one <image>",
        "povid-lost-image": "image cannot be read",
        "povid-outside": "image cannot be read",
        "povid-other-question": "rejected_conversations: asks another question",
        "povid-same": "rejected: equal to chosen, so the pair prefers nothing",
        "povid-two-answers": "conversations: human and gpt do not take turns",
        "povid-row13": "row: is list, not a mapping of keys",
    }
    check_details(records, FIXTURES / "povid.json")
    assert POVID.expected == {"conversations: several questions"}


def test_povid_first_of_several_turns(coco: Path) -> None:
    made = pairs(read(povid(coco, turns="first")))
    pair = made["povid-000000000025.2"]
    assert pair.prompt == "How many giraffes are there?"
    assert (pair.chosen, pair.rejected) == ("There are two giraffes.", "There are three giraffes.")
    assert pair.origin["turns"] == 2


def test_povid_renamed_file_is_preferred(coco: Path, tmp_path: Path) -> None:
    release = tmp_path / "release"
    release.mkdir()
    text = (FIXTURES / "povid.json").read_text(encoding="utf-8")
    for name in ("POVID_preference_data_for_VLLMs.json",
                 "POVID_preference_data_for_VLLMs_version_1.json"):  # fmt: skip
        (release / name).write_text(text, encoding="utf-8")
    source = POVID(POVID.Settings(path=str(release), images=str(coco)))
    assert [f.name for f in source.files()] == ["POVID_preference_data_for_VLLMs_version_1.json"]
    assert len(pairs(read(source))) == 2


def test_mdpo_chat_prompts(tmp_path: Path) -> None:
    images = pictures(tmp_path, "images/llava-reasoning-1.jpg", "images/llava-reasoning-2.jpg")
    source = MDPO(MDPO.Settings(path=str(FIXTURES / "mdpo.json"), images=str(images)))
    records = read(source)
    made = pairs(records)
    assert {key: pair.prompt for key, pair in made.items()} == {
        "mdpo-row1": "Why are the people outside?",
        "mdpo-row2": "What is on the table?",
    }
    assert made["mdpo-row2"].image.read() == png(1)
    assert all(pair.rejected_image is None for pair in made.values())
    assert skips(records) == {
        "mdpo-row3": "prompt: several questions",
        "mdpo-row4": "prompt: a chat that does not end with ASSISTANT:",
        "mdpo-row5": "rejected: missing",
        "mdpo-row6": "img_path: missing",
    }
    check_details(records, FIXTURES / "mdpo.json")
    # The folder may be the one that holds the files.
    inner = MDPO(MDPO.Settings(path=str(FIXTURES / "mdpo.json"), images=str(images / "images")))
    assert pairs(read(inner)).keys() == made.keys()


def llava_rlhf(coco: Path, **settings: Any) -> Any:
    path = FIXTURES / "llava_7b_v1_preference.json"
    return LLAVA_RLHF(LLAVA_RLHF.Settings(path=str(path), images=str(coco), **settings))


def test_llava_rlhf_rows(coco: Path) -> None:
    records = read(llava_rlhf(coco))
    made = pairs(records)
    first, second = made["llava_rlhf-000000000025"], made["llava_rlhf-000000000026"]
    assert (first.chosen, first.rejected) == ("Two giraffes.", "Two giraffes and an elephant.")
    assert (second.chosen, second.rejected) == ("Trees.", "Trees and a house.")
    assert second.prompt == "What is in the background?"
    assert first.facts.captions == ()
    assert len(made) == 2
    assert skips(records) == {
        "llava_rlhf-000000000027": "conversations: asked after earlier turns",
        "llava_rlhf-a-third": "preference: neither 1 nor 2",
        "llava_rlhf-as-text": "preference: neither 1 nor 2",
        "llava_rlhf-no-output": "output_2: missing",
        "llava_rlhf-bare-output": "output_1: is str, not a mapping",
        "llava_rlhf-lost-image": "image cannot be read",
    }
    check_details(records, FIXTURES / "llava_7b_v1_preference.json")


def test_llava_rlhf_history_and_captions(coco: Path) -> None:
    settings = {"history": "join", "captions": str(FIXTURES / "image_to_caption.json")}
    made = pairs(read(llava_rlhf(coco, **settings)))
    pair = made["llava_rlhf-000000000027"]
    # In LLaVA-1.5's template, "USER: <image>\n{prompt} ASSISTANT:", this reads as three turns.
    assert pair.prompt == "How many giraffes?\nASSISTANT: Two.\nUSER: Do they eat?"
    assert pair.facts.captions == ("Two giraffes stand under trees.", "A giraffe eats leaves.")
    assert not pair.facts.exhaustive


def test_order_limit_and_seed(coco: Path) -> None:
    everything = read(povid(coco))
    assert [r.id for r in read(povid(coco), limit=3)] == [r.id for r in everything[:3]]
    assert read(povid(coco), seed=7) == everything
    assert isinstance(everything[0], Preference)
