"""VLFeedback: every untied pair of rated completions, in both of the released forms."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_builders.sources._released import SourceError
from data_builders.sources.vlfeedback import METHOD as VLFEEDBACK
from tests.data_builders.sources.released import (
    FIXTURES,
    IMAGE,
    check_details,
    pairs,
    pictures,
    png,
    read,
    skips,
)

FILE = FIXTURES / "vlfeedback_80k.jsonl"
ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    names = [f"svit-{n}.jpg" for n in range(2, 8)]
    return pictures(tmp_path / "merged_images", "llava-1.jpg", *names)


def vlfeedback(path: Path, **settings: Any) -> Any:
    return VLFEEDBACK(VLFEEDBACK.Settings(path=str(path), **settings))


def rows() -> list[dict[str, Any]]:
    found = []
    for line in FILE.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def test_every_untied_pair(images: Path) -> None:
    records = read(vlfeedback(FILE, images=str(images)))
    made, [first, *_] = pairs(records), rows()
    # The definition itself, on the raw row.
    means = [
        sum(float(c["annotations"][a]["Rating"]) for a in ASPECTS) / 3 for c in first["completions"]
    ]
    texts = [c["response"] for c in first["completions"]]
    wanted = {
        f"vlfeedback-llava-1-{i}-{j}": (
            (texts[i], texts[j]) if means[i] > means[j] else (texts[j], texts[i])
        )
        for i, j in combinations(range(4), 2)
        if means[i] != means[j]
    }
    assert len(wanted) == 5
    ours = {k: v for k, v in made.items() if k.startswith("vlfeedback-llava-1-")}
    assert {k: (v.chosen, v.rejected) for k, v in ours.items()} == wanted
    pair = ours["vlfeedback-llava-1-0-3"]
    assert pair.scores == {
        "chosen": 5.0,
        "rejected": 2.0,
        "chosen_helpfulness": 5.0,
        "chosen_visual_faithfulness": 5.0,
        "chosen_ethical_considerations": 5.0,
        "rejected_helpfulness": 1.0,
        "rejected_visual_faithfulness": 3.0,
        "rejected_ethical_considerations": 2.0,
    }
    assert pair.origin["models"] == {"chosen": "gpt4v", "rejected": "fuyu-8b"}
    assert pair.image.read() == png(0)
    # Another row of the same id.
    assert made["vlfeedback-llava-1.2-0-1"].prompt == "Is it asleep?"
    assert made["vlfeedback-svit-2-0-4"].prompt == "How many?"


def test_ties_and_faults(images: Path) -> None:
    source = vlfeedback(FILE, images=str(images))
    records = read(source)
    assert skips(records) == {
        "vlfeedback-llava-1-1-2": "ratings tie",
        "vlfeedback-row3": "row: is not JSON",
        "vlfeedback-svit-2-1": "Rating: is not a number",
        "vlfeedback-svit-2-2": "Rating: is not a number",
        "vlfeedback-svit-2-3": "Rating: is not from 1 to 5",
        "vlfeedback-svit-3-0-1": "rejected: equal to chosen, so the pair prefers nothing",
        "vlfeedback-lost": "image cannot be read",
        "vlfeedback-svit-4": "completions: fewer than two",
        "vlfeedback-svit-5": "completions: is not a list of completions",
        "vlfeedback-svit-6": "prompt: missing",
        "vlfeedback-svit-7-1": "Visual Faithfulness: missing",
    }
    check_details(records, FILE)
    assert source.expected == {"ratings tie"}


def as_parquet(file: Path, form: str) -> Path:
    """The rows as ``datasets`` writes them: completions as lists, once or twice turned around."""
    rating = pa.struct({"Rating": pa.string(), "Rationale": pa.string()})
    told = pa.struct(dict.fromkeys(ASPECTS, rating))
    annotations = pa.list_(told)
    if form == "twice":
        inner = pa.struct({"Rating": pa.list_(pa.string()), "Rationale": pa.list_(pa.string())})
        annotations = pa.struct(dict.fromkeys(ASPECTS, inner))
    texts = {"model": pa.list_(pa.string()), "response": pa.list_(pa.string())}
    turned = pa.struct({"annotations": annotations, **texts})
    schema = pa.schema(
        {"id": pa.string(), "prompt": pa.string(), "completions": turned, "image": IMAGE}
    )
    lines = []
    for number, row in enumerate(rows()[:2]):
        said = [c["annotations"] for c in row["completions"]]
        whole: Any = said
        if form == "twice":
            keys = ("Rating", "Rationale")
            whole = {a: {k: [s[a][k] for s in said] for k in keys} for a in ASPECTS}
        completions = {
            "annotations": whole,
            "model": [c["model"] for c in row["completions"]],
            "response": [c["response"] for c in row["completions"]],
        }
        image = {"bytes": png(number), "path": None}
        lines.append(
            {"id": row["id"], "prompt": row["prompt"], "completions": completions, "image": image}
        )
    pq.write_table(pa.Table.from_pylist(lines, schema=schema), file)
    return file


@pytest.mark.parametrize("form", ["once", "twice"])
def test_parquet_form_gives_the_same_pairs(form: str, images: Path, tmp_path: Path) -> None:
    found = read(vlfeedback(as_parquet(tmp_path / "train.parquet", form)))
    told = read(vlfeedback(FILE, images=str(images)), limit=2)
    assert skips(found) == skips(told)
    ours, theirs = pairs(found), pairs(told)
    assert ours.keys() == theirs.keys() and len(ours) == 6
    for key, pair in ours.items():
        other = theirs[key]
        assert (pair.prompt, pair.chosen, pair.rejected) == (
            other.prompt, other.chosen, other.rejected
        )  # fmt: skip
        assert pair.scores == other.scores and pair.origin == other.origin
    assert ours["vlfeedback-llava-1.2-0-1"].image.read() == png(1)


def test_images_have_to_be_somewhere() -> None:
    with pytest.raises(SourceError, match=r"names its image 'llava-1\.jpg'.*Give the folder"):
        read(vlfeedback(FILE))
