"""What a build that goes on stands on: chunks at rest, tallies that add up, sources that skip."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from data_builders._chunks import BuildError, Journal
from data_builders._tally import Tally
from data_builders.sources.coco_instances import METHOD as COCO
from data_builders.sources.microworld import METHOD as MICROWORLD
from data_builders.sources.photo_folder import METHOD as PHOTOS
from mlalign.records import Claim, Facts, ImageRef, ObjectFact, Preference, Segment, Skip


def test_two_processes_do_not_build_into_one_folder(tmp_path):
    journal = Journal(tmp_path / "out.partial", {})
    with pytest.raises(BuildError, match="another process"):
        Journal(tmp_path / "out.partial", {})
    journal.close()
    Journal(tmp_path / "out.partial", {}).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_pair_comes_back_from_its_chunk_as_it_was(tmp_path):
    pair = Preference(
        id="a/\u00e4",
        image=ImageRef(data=b"one", path="deep/down/one.png"),
        image_sha256="12",
        prompt="  What?\u2028\n",
        chosen="Yes.\r\n",
        rejected="No.\x0b",
        segments=(Segment(side="chosen", start=0, end=3, label="edit", weight=2.5),),
        claims=(
            Claim(side="chosen", text="t", question="q?", p_yes=0.1, p_no=1 / 3, verdict="no"),
        ),
        scores={"z": 1 / 3, "a": -2.0},
        rejected_image=ImageRef(data=b"two"),
        facts=Facts(
            objects=(ObjectFact(name="dog", box=(0.5, 1.0, 2.0, 1e-9), attributes=("red",)),),
            captions=("c",),
            answer="yes",
            scene="kitchen",
            exhaustive=True,
        ),
        origin={"deep": {"list": [1, None, True]}},
    )
    plain = dataclasses.replace(pair, id="b", rejected_image=None)
    journal = Journal(tmp_path / "j", {})
    journal.commit(Tally(read=1, candidates=2), [pair, plain])
    journal.commit(Tally(read=1), [])
    back, other = journal
    for before, after in ((pair, back), (plain, other)):
        assert after.image.path == before.image.path and after.image.read() == b"one"
        fields = {"image": before.image, "rejected_image": before.rejected_image}
        assert dataclasses.replace(after, **fields) == before
    assert back.rejected_image is not None and back.rejected_image.path is None
    assert back.rejected_image.read() == b"two" and other.rejected_image is None
    journal.close()


def test_tallies_add_up_as_if_they_were_one():
    skips = [Skip(id=f"s{n // 2}", reason=f"why {n % 3}") for n in range(20)]
    whole, parts = Tally(read=20), Tally()
    whole.skips(skips, frozenset({"why 0"}))
    for start in range(0, 20, 4):
        part = Tally(read=4)
        part.skips(skips[start : start + 4], frozenset({"why 0"}))
        parts.add(Tally.from_json(json.loads(json.dumps(part.to_json()))))
    assert parts == whole
    assert whole.first_ids["why 1"] == ["s0", "s2", "s3"] and whole.faulty == 10


def sources(folder: Path):
    """Each source of examples over twelve images, and its module's name."""
    instances = {
        "images": [
            {"id": n, "file_name": f"photo{n}.png", "width": 32, "height": 32} for n in range(12)
        ],
        "annotations": [],
        "categories": [{"id": 1, "name": "dog"}],
    }
    file = folder / "instances.json"
    file.write_text(json.dumps(instances), encoding="utf-8")
    coco = COCO.Settings(instances=str(file), images=str(folder / "images"), probe=2)
    return {
        "photo_folder": PHOTOS(PHOTOS.Settings(folder=str(folder), probe=2)),
        "coco_instances": COCO(coco),
        "microworld": MICROWORLD(MICROWORLD.Settings(train=12)),
    }


@pytest.mark.parametrize("name", ["photo_folder", "coco_instances", "microworld"])
def test_sources_begin_later_without_opening_what_is_before(name, photos, monkeypatch):
    source = sources(photos)[name]
    whole = list(source.examples("train", 7, 0))
    assert len(whole) == 7
    opened = 0
    module = sys.modules[type(source).__module__]
    owner, call = (module.world, "example") if name == "microworld" else (module, "checked_image")
    real = getattr(owner, call)

    def counted(*args):
        nonlocal opened
        opened += 1
        return real(*args)

    monkeypatch.setattr(owner, call, counted)
    assert list(source.examples("train", 7, 0, start=4)) == whole[4:]
    assert opened == 3
    assert list(source.examples("train", 7, 0, start=9)) == []
