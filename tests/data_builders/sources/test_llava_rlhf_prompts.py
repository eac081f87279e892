"""LLaVA-RLHF's prompts: what is asked, what the reward model is shown, splits, order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_builders.sources._released import SourceError
from data_builders.sources.llava_rlhf_prompts import METHOD
from mlalign.records import Example, Skip, example_from_json, to_json
from tests.data_builders.sources.released import FIXTURES, pictures, png

CAPTIONS = ("Two giraffes stand under trees.", "A giraffe eats leaves.")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return pictures(tmp_path / "coco", "000000000025.jpg", "000000000030.jpg")


def prompts(coco: Path, **settings: Any) -> Any:
    given = {"captions": str(FIXTURES / "image_to_caption.json"), **settings}
    return METHOD(METHOD.Settings(path=str(FIXTURES), images=str(coco), **given))


def made(records: list[Any]) -> dict[str, Example]:
    return {r.id.split("-", 1)[1]: r for r in records if isinstance(r, Example)}


def test_rows(coco: Path) -> None:
    records = list(prompts(coco).examples("train", None, 0))
    rows = made(records)
    assert {
        name: (e.facts.answer, e.facts.captions, e.length_bonus) for name, e in rows.items()
    } == {
        "000000000025": (None, CAPTIONS, 1.0),
        "000000000025.2": ("B", ("Giraffes are tall.",), 0.5),
        "no": ("No", CAPTIONS, 0.0),
        "yes": ("Yes", CAPTIONS, 1.0),
        "row5": (None, CAPTIONS, 1.0),
    }
    # The first question, without the tag of the image.
    assert rows["000000000025"].prompt == "What animals are here?"
    assert rows["000000000025.2"].prompt.startswith("What is tall?")
    assert rows["no"].image.read() == png(0) and not rows["no"].facts.exhaustive
    skips = {s.id.split("-", 1)[1]: s for s in records if isinstance(s, Skip)}
    assert {name: skip.reason for name, skip in skips.items()} == {
        "kind": "caption_type: none of 1 to 7",
        "bonus": "length_bonus: is not a number",
        "turns": "conversations: human and gpt do not take turns",
        "unsaid": "captions: none for this image",
        "lost": "captions: none for this image",
        "row11": "row: is list, not a mapping of keys",
    }
    file = FIXTURES / "llava_ppo50k-aokvqa12k-vqa10k.json"
    assert skips["kind"].detail.startswith(f"{file}:6: record 'llava_rlhf_prompts-kind'")


def test_without_captions_a_lost_image_is_what_is_wrong(coco: Path) -> None:
    records = list(prompts(coco, captions=None).examples("train", None, 0))
    assert made(records)["unsaid"].facts.captions == ()
    assert {r.id: r.reason for r in records if isinstance(r, Skip)}[
        "llava_rlhf_prompts-lost"
    ] == "image cannot be read"


def test_order_limit_and_start(coco: Path) -> None:
    source = prompts(coco)
    ids = [r.id for r in source.examples("train", None, 3)]
    assert [r.id for r in source.examples("train", 6, 3, start=2)] == ids[2:6]
    other = [r.id for r in source.examples("train", None, 4)]
    assert other != ids and sorted(other) == sorted(ids)
    assert not list(source.examples("heldout", None, 3))
    assert source.fingerprint()["files_sha256"].keys() == {"llava_ppo50k-aokvqa12k-vqa10k.json"}


def test_splits_share_no_image(coco: Path) -> None:
    source = prompts(coco, captions=None, heldout_share=0.4, probe_share=0.4)
    names = {
        split: {e.image.path for e in made(list(source.examples(split, None, 0))).values()}
        for split in ("train", "heldout", "probe")
    }
    assert sum(map(len, names.values())) == len(set.union(*names.values())) == 2
    with pytest.raises(ValueError, match="no split 'test'"):
        list(source.examples("test", None, 0))


def test_to_json_and_back(coco: Path) -> None:
    for example in made(list(prompts(coco).examples("train", None, 0))).values():
        assert example_from_json(to_json(example), example.image) == example


def test_a_folder_without_the_prompts(coco: Path) -> None:
    source = METHOD(METHOD.Settings(path=str(coco), images=str(coco)))
    with pytest.raises(SourceError, match=r"holds none of \*ppo\*\.json"):
        list(source.examples("train", None, 0))
