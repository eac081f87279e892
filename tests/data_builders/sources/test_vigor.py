"""ViGoR: ratings of sentences, as rated answers and as pairs of one image's texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_builders.sources.vigor import METHOD as VIGOR
from mlalign.records import ImageRef, Rated, RecordError, Skip, Span
from tests.data_builders.sources.released import (
    FIXTURES,
    fixture,
    pairs,
    parquet,
    pictures,
    png,
    read,
    skips,
)

FILE = FIXTURES / "annotations.json"


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return pictures(
        tmp_path, "000000000025.jpg", "000000000030.jpg", "000000000041.jpg", "000000000043.jpg"
    )


def vigor(coco: Path | None, path: Path = FILE, **settings: Any) -> Any:
    given = {"images": str(coco)} if coco is not None else {}
    return VIGOR(VIGOR.Settings(path=str(path), **given, **settings))


def test_pairs_by_the_share_of_accurate_sentences(coco: Path) -> None:
    records = read(vigor(coco))
    [pair] = pairs(records).values()
    assert pair.id == "vigor-000000000025+000000000025.2"
    assert pair.chosen.startswith("Two giraffes") and pair.rejected.startswith("Three giraffes")
    assert pair.scores == {"chosen": 1.0, "rejected": pytest.approx(1 / 3)}
    assert pair.prompt == "Describe this image in detail."
    assert pair.image.read() == png(0) and pair.segments == ()
    assert skips(records) == {
        "vigor-000000000030": "scores tie",
        "vigor-000000000041": "the only usable text of its image",
        "vigor-000000000041.2": "Accurate: neither Yes nor No",
        "vigor-000000000042": "annotations: is not JSON",
        "vigor-000000000042.2": "overall_detail_score: is not a number",
        "vigor-000000000043": "the only usable text of its image",
        # Texts of no named image are not texts of one image.
        "vigor-row10": "image_id: missing",
        "vigor-row11": "image_id: missing",
    }


def test_pairs_by_detail(coco: Path) -> None:
    made = pairs(read(vigor(coco, score="detail")))
    assert {pair.chosen.split(".")[0] for pair in made.values()} == {
        "Three giraffes stand under trees", "A white vase stands here",
    }  # fmt: skip
    assert made["vigor-000000000030+000000000030.2"].scores == {"chosen": 3.0, "rejected": 2.0}


def test_ratings_of_both_texts(coco: Path) -> None:
    made = pairs(read(vigor(coco, ratings=True)))
    # Ties too: a rating needs no better text.
    assert set(made) == {
        "vigor-000000000025+000000000025.2",
        "vigor-000000000030+000000000030.2",
    }
    pair = made["vigor-000000000025+000000000025.2"]
    assert [(getattr(pair, s.side)[s.start : s.end], s.label, s.weight) for s in pair.segments] == [
        ("Two giraffes stand under trees.", "sentence", 1.0),
        ("One of them eats.", "sentence", 1.0),
        ("Three giraffes stand under trees.", "sentence", 0.0),
        ("One of them eats.", "sentence", 1.0),
        ("A man feeds it!", "sentence", 0.0),
    ]
    reasons = skips(read(vigor(coco, ratings=True)))
    assert reasons["vigor-000000000043"] == "annotations: sentences and scores differ in number"
    assert reasons["vigor-000000000043"] in VIGOR.expected


def test_each_text_is_rated_once(tmp_path: Path, coco: Path) -> None:
    rows = [
        {
            "image_id": "000000000025",
            "text": f"Number {number}.",
            "annotations": {"per_sentence_scores": {"0": {"Accurate": "Yes"}}},
        }
        for number in range(5)
    ]
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(rows))
    made = pairs(read(vigor(coco, file, ratings=True))).values()
    assert [(p.chosen, p.rejected) for p in made] == [
        ("Number 0.", "Number 1."),
        ("Number 2.", "Number 3."),
        ("Number 3.", "Number 4."),
    ]


def test_a_limit_completes_what_it_reads(coco: Path) -> None:
    records = read(vigor(coco), limit=3)
    assert [r.id for r in records] == ["vigor-000000000030", "vigor-000000000025+000000000025.2"]
    assert skips(records) == {"vigor-000000000030": "the only usable text of its image"}
    assert not pairs(read(vigor(coco), limit=2))


def test_rated_answers(coco: Path) -> None:
    records = list(vigor(coco).rated())
    rated = {r.id: r for r in records if isinstance(r, Rated)}
    answer = rated["vigor-000000000025.2"]
    assert [(answer.text[s.start : s.end], s.weight) for s in answer.segments] == [
        ("Three giraffes stand under trees.", 0.0),
        ("One of them eats.", 1.0),
        ("A man feeds it!", 0.0),
    ]
    assert {s.label for s in answer.segments} == {"sentence"}
    assert answer.scores == {"accuracy": pytest.approx(1 / 3), "detail": 4.0}
    assert answer.image.read() == png(0)
    assert answer.origin["sentences"][2] == {"Accurate": "No", "Creative": "Yes"}
    reasons = {r.id: r.reason for r in records if isinstance(r, Skip)}
    assert reasons["vigor-000000000043"] == "annotations: sentences and scores differ in number"
    assert len(rated) == 5 and len(records) == 11


@pytest.mark.parametrize("spans", [((0, 3), (2, 5)), ((3, 5), (0, 2)), ((0, 9),), ((2, 2),)])
def test_spans_lie_in_the_text_in_order(spans: tuple[tuple[int, int], ...]) -> None:
    segments = tuple(Span(start=a, end=b, label="sentence", weight=1.0) for a, b in spans)
    image = ImageRef(data=png(0))
    with pytest.raises(RecordError, match="segments"):
        Rated(id="r", image=image, image_sha256="", prompt="p", text="Text.", segments=segments)


def test_mirror_with_images_inside(tmp_path: Path, coco: Path) -> None:
    rows = []
    for number, row in enumerate(fixture("annotations.json")[:4]):
        said = row["annotations"]
        rows.append(
            {
                "image_id": row["image_id"],
                "text": row["text"],
                "annotations": said if isinstance(said, str) else json.dumps(said),
                "image": {"png": number % 2, "path": f"{row['image_id']}.jpg"},
            }
        )
    file = parquet(tmp_path / "vigor-000.parquet", rows)
    ours, theirs = read(vigor(None, file)), read(vigor(coco), limit=4)
    assert skips(ours) == skips(theirs)
    [pair], [other] = pairs(ours).values(), pairs(theirs).values()
    assert (pair.id, pair.chosen, pair.image.read()) == (other.id, other.chosen, other.image.read())
