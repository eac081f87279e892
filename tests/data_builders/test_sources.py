"""Sources: splits that never overlap, facts, and bad files that become counted skips."""

import json
import struct
import zlib
from collections import Counter
from typing import Any

import pytest
from PIL import Image

from data_builders import engine
from data_builders._context import BuildContext
from data_builders.povid import METHOD as POVID
from data_builders.sources.coco_instances import METHOD as COCO
from data_builders.sources.microworld import METHOD as MICROWORLD
from data_builders.sources.photo_folder import METHOD as FOLDER
from mlalign.objects import vocabulary
from mlalign.records import Example, Skip

SPLITS = ("train", "heldout", "probe")


def folder(path, **settings):
    return FOLDER(FOLDER.Settings(folder=str(path), **settings))


def read(source, split="train", limit=None, seed=0) -> list[Any]:
    return list(source.examples(split, limit, seed))


def bomb() -> bytes:
    """A PNG of a few bytes that claims 40,000 x 40,000 pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", head)
        + part(b"IDAT", zlib.compress(b""))
        + part(b"IEND", b"")
    )


def test_splits_of_every_source_are_disjoint(photos):
    sources = [MICROWORLD(MICROWORLD.Settings(train=9, heldout=9, probe=9)),
               folder(photos, probe=3, heldout_share=0.3)]  # fmt: skip
    for source in sources:
        images = Counter(e.image_sha256 for split in SPLITS for e in read(source, split))
        assert set(images.values()) == {1}
        assert [e.id for e in read(source, seed=0)] == [e.id for e in read(source, seed=0)]
        assert all(read(source, split) for split in SPLITS)
        with pytest.raises(ValueError, match="train, heldout, probe"):
            read(source, "test")


def test_lists_decide_where_they_are_there(photos):
    (photos / "train.txt").write_text("\n".join(f"photo{i}.png" for i in range(10)))
    (photos / "dev.txt").write_text("photo10.png\nphoto11.png\n")
    source = folder(photos, probe=4)
    assert {e.id for e in read(source, "heldout")} == {"photo10", "photo11"}
    assert {e.id for e in read(source, "probe")} == {f"photo{i}" for i in range(6, 10)}
    assert len(read(source, "train", limit=3)) == 3
    assert {e.id for e in read(source, "train", seed=1)} == {f"photo{i}" for i in range(6)}
    (photos / "dev.txt").write_text("photo1.png\n")
    with pytest.raises(ValueError, match=r"both list photo1\.png"):
        read(source)


def test_facts_come_from_captions(photos):
    example = read(folder(photos, probe=1))[0]
    assert example.facts.names() == {"dog", "sports ball"}
    assert not example.facts.exhaustive
    assert {o.name: o.attributes for o in example.facts.objects} == {
        "dog": ("black",), "sports ball": ("red",),
    }  # fmt: skip
    assert example.facts.captions[0] == "A black dog runs on the grass."
    assert example.image_sha256 == example.image.sha256()


def test_bad_images_become_counted_skips_and_are_never_replaced(photos, tmp_path):
    images = photos / "images"
    (images / "photo0.png").unlink()
    whole = (images / "photo1.png").read_bytes()
    (images / "photo1.png").write_bytes(whole[: len(whole) * 2 // 3])
    (images / "photo2.png").write_text("<html>not found</html>")
    (images / "photo3.png").write_bytes(bomb())
    source = folder(photos, probe=0, heldout_share=0.001)
    records = read(source)
    skips = {r.id: r for r in records if isinstance(r, Skip)}
    assert {k: v.reason for k, v in skips.items()} == {
        "photo0": "image cannot be read",
        "photo1": "image is truncated or damaged",
        "photo2": "image file is not an image",
        "photo3": "image has too many pixels",
    }
    for record_id, skip in skips.items():
        assert record_id in skip.detail and f"{record_id}.png" in skip.detail
    assert len({r.id for r in records}) == len(records) == 12
    context = BuildContext(vocabulary=vocabulary("coco"), language="english")
    manifest = engine.build(
        POVID(POVID.Settings(), context), records, out_folder=tmp_path / "out", max_skipped=0.5
    )
    assert {
        reason: found["count"] for reason, found in manifest["skipped"].items()
    } == dict.fromkeys((s.reason for s in skips.values()), 1)
    with pytest.raises(engine.BuildError, match="image cannot be read"):
        engine.build(
            POVID(POVID.Settings(), context), records, out_folder=tmp_path / "no", max_skipped=0.1
        )
    assert not (tmp_path / "no").exists()


def test_bad_caption_files(photos):
    lines = (photos / "captions.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"image": "photo0.png", "captions": "one text"})
    lines[1] = json.dumps({"image": "photo1.png", "captions": [" "]})
    (photos / "captions.jsonl").write_text("\n".join(lines))
    (photos / "train.txt").write_text("photo0.png\nphoto1.png\nphoto2.png\nphoto99.png\n")
    (photos / "dev.txt").write_text("photo5.png\n")
    reasons = {r.id: r.reason for r in read(folder(photos, probe=0)) if isinstance(r, Skip)}
    assert reasons == {
        "photo0": "captions are not a list of texts",
        "photo1": "captions are not a list of texts",
        "photo99": "no captions",
    }
    (photos / "captions.jsonl").write_text('{"image": "photo0.png"}\n')
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 1.*captions"):
        read(folder(photos, probe=0))
    with pytest.raises(ValueError, match=r"data\.source\.probe: 64 images"):
        read(folder(photos))
    with pytest.raises(ValueError, match=r"nowhere.*does not exist"):
        folder(photos / "nowhere")


@pytest.fixture
def coco(photos):
    instances = {
        "images": [{"id": i, "file_name": f"photo{i}.png"} for i in range(12)],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"image_id": 0, "category_id": 18, "bbox": [1, 2, 10, 20], "iscrowd": 0},
            {"image_id": 0, "category_id": 1, "bbox": [0, 0, 30, 30], "iscrowd": 1},
            {"image_id": 1, "category_id": 77, "bbox": [0, 0, 3, 3], "iscrowd": 0},
        ],
    }
    captions = {"annotations": [{"image_id": 0, "caption": "A white dog chasing a ball"}]}
    (photos / "instances.json").write_text(json.dumps(instances))
    (photos / "coco_captions.json").write_text(json.dumps(captions))
    return COCO(
        COCO.Settings(
            instances=str(photos / "instances.json"),
            images=str(photos / "images"),
            captions=str(photos / "coco_captions.json"),
            probe=2,
        )
    )


def test_coco_boxes_crowds_and_captions(coco):
    records = {r.id: r for split in SPLITS for r in read(coco, split)}
    assert len(records) == 12
    example = records["photo0"]
    assert isinstance(example, Example) and example.facts.exhaustive
    facts = {o.name: o for o in example.facts.objects}
    assert facts["dog"].box == (1.0, 2.0, 11.0, 22.0) and facts["dog"].attributes == ("white",)
    assert facts["person"].box is None and facts["sports ball"].box is None
    assert records["photo1"].reason == "annotation of an unknown category"
    assert coco.fingerprint()["images_listed"] == 12


def test_coco_bad_files(photos):
    (photos / "bad.json").write_text("{")
    for name, message in (("bad.json", "not JSON"), ("none.json", "cannot read")):
        with pytest.raises(ValueError, match=message):
            COCO(COCO.Settings(instances=str(photos / name), images="."))
    (photos / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'images'"):
        COCO(COCO.Settings(instances=str(photos / "bad.json"), images="."))


@pytest.mark.data
def test_real_photographs(shared_data):
    flickr = folder(shared_data / "flickr8k")
    assert len(flickr.names("train")) == 4000 - 64 and len(flickr.names("heldout")) == 300
    assert all(isinstance(e, Example) for e in read(flickr, limit=20))
    coco = COCO(
        COCO.Settings(
            instances=str(shared_data / "coco128" / "instances.json"),
            images=str(shared_data / "coco128" / "images"),
        )
    )
    records = [r for split in SPLITS for r in read(coco, split, limit=10)]
    boxes = [(r, o.box) for r in records for o in r.facts.objects if o.box is not None]
    assert boxes
    for record, (x0, y0, x1, y1) in boxes:
        with Image.open(record.image.path) as image:
            assert 0 <= x0 < x1 <= image.width + 1 and 0 <= y0 < y1 <= image.height + 1
