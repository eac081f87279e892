"""HA-DPO: two files for each model, paraphrases, and images by Visual Genome's index."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from data_builders.sources._released import SourceError
from data_builders.sources.ha_dpo import METHOD as HA_DPO
from data_builders.sources.ha_dpo import PROMPTS
from tests.data_builders.sources.released import (
    FIXTURES,
    fixture,
    pairs,
    pictures,
    png,
    read,
    skips,
)

INDEX = str(FIXTURES / "image_data.json")
LLAVA = fixture("hadpo/llava-v1.5/desc_data.json")


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    return pictures(tmp_path / "vg", "VG_100K_2/1.jpg", "VG_100K/2.jpg", "VG_100K/3.jpg")


def ha_dpo(genome: Path, path: Path = FIXTURES, **settings: Any) -> Any:
    given = {"index": INDEX, "images": str(genome), **settings}
    return HA_DPO(HA_DPO.Settings(path=str(path), **given))


def test_questions(genome: Path) -> None:
    source = ha_dpo(genome, parts=("questions",))
    records = read(source)
    [pair] = pairs(records).values()
    assert pair.id == "ha_dpo-ques-1"
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        "Is there a dog in the image?",
        "No, there is no dog.",
        "Yes, there is a dog.",
    )
    assert pair.image.read() == png(0)
    assert pair.origin["answer"] == "no" and pair.origin["model"] == "llava-v1.5"
    assert skips(records) == {
        "ha_dpo-ques-1.2": "correct: answered correctly",
        # The key of the rejected side is spelled so in the release, and only so.
        "ha_dpo-ques-2": "reject: missing",
        "ha_dpo-ques-2.2": "correct: missing",
        "ha_dpo-ques-3": "question: is list, not text",
    }
    assert source.expected == {"correct: answered correctly"}
    kept = pairs(read(ha_dpo(genome, parts=("questions",), keep_correct=True)))
    assert list(kept) == ["ha_dpo-ques-1", "ha_dpo-ques-1.2", "ha_dpo-ques-2.2"]


def test_one_paraphrase_of_either_side(genome: Path) -> None:
    seen: set[tuple[int, int]] = set()
    prompts = set()
    for seed in range(60):
        source = ha_dpo(genome, parts=("descriptions",), repeat_descriptions=1)
        made = pairs(read(source, seed=seed))
        pair = made["ha_dpo-desc-1"]
        first, second = pair.origin["paraphrases"]
        assert pair.chosen == LLAVA["1"]["chosen"][first]
        assert pair.rejected == LLAVA["1"]["rejected"][second]
        seen.add((first, second))
        prompts.add(pair.prompt)
    # Drawn apart from each other: every one of the nine, and every prompt.
    assert seen == {(i, j) for i in range(3) for j in range(3)}
    assert prompts == set(PROMPTS)
    again = pairs(read(ha_dpo(genome, parts=("descriptions",), repeat_descriptions=1), seed=59))
    assert again == made


def test_all_paraphrases_are_paired_in_order(genome: Path) -> None:
    source = ha_dpo(genome, parts=("descriptions",), repeat_descriptions=1, paraphrases="all")
    records = read(source)
    made = pairs(records)
    for k in range(3):
        pair = made[f"ha_dpo-desc-1-{k}"]
        assert pair.chosen == LLAVA["1"]["chosen"][k]
        assert pair.rejected == LLAVA["1"]["rejected"][k]
    assert sorted(made) == sorted(
        [f"ha_dpo-desc-1-{k}" for k in range(3)] + ["ha_dpo-desc-2-0", "ha_dpo-desc-2-2"]
    )
    assert skips(records) == {
        "ha_dpo-desc-2-1": "chosen: empty",
        "ha_dpo-desc-3": "rejected: not as many paraphrases as chosen",
        "ha_dpo-desc-99": "image_id: is not in Visual Genome's index",
        "ha_dpo-row5": "row: is str, not a mapping of keys",
        "ha_dpo-desc-5": "chosen: is not a list of paraphrases",
    }


def test_order_and_repeats_of_the_released_loader(genome: Path) -> None:
    records = read(ha_dpo(genome, model="minigpt4"))
    assert [r.id for r in records] == [
        "ha_dpo-ques-2",
        "ha_dpo-desc-1",
        "ha_dpo-desc-2",
        "ha_dpo-desc-1.2",
        "ha_dpo-desc-2.2",
    ]
    made = pairs(records)
    assert made["ha_dpo-desc-1"].chosen == made["ha_dpo-desc-1.2"].chosen
    assert made["ha_dpo-desc-1"].rejected == made["ha_dpo-desc-1.2"].rejected
    assert made["ha_dpo-desc-2"].image.read() == png(1), "an id may be text"
    assert [r.id for r in read(ha_dpo(genome, model="minigpt4"), limit=2)] == [
        "ha_dpo-ques-2",
        "ha_dpo-desc-1",
    ]


def test_folders(genome: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(FIXTURES / "hadpo" / "minigpt4", flat)
    assert len(read(ha_dpo(genome, flat, model="minigpt4"))) == 5
    only = tmp_path / "only"
    shutil.copytree(FIXTURES / "hadpo" / "minigpt4", only / "minigpt4")
    with pytest.raises(SourceError, match="another model than llava-v1"):
        read(ha_dpo(genome, only))
    one = FIXTURES / "hadpo" / "minigpt4" / "desc_data.json"
    with pytest.raises(SourceError, match="one file, but parts names two"):
        read(ha_dpo(genome, one))
    assert len(read(ha_dpo(genome, one, model="minigpt4", parts=("descriptions",)))) == 4


def test_index(genome: Path, tmp_path: Path) -> None:
    shutil.copy(INDEX, genome / "image_data.json")
    found = read(ha_dpo(genome, index=None, model="minigpt4"))
    assert len(pairs(found)) == 5
    bad = tmp_path / "bad.json"
    bad.write_text('[{"image_id": 1}]')
    with pytest.raises(SourceError, match=r"bad\.json is not a list of image_id and url"):
        read(ha_dpo(genome, index=str(bad)))
    assert ha_dpo(genome).fingerprint()["images_indexed"] == 3
