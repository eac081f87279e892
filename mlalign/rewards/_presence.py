"""How well a detector tells which classes are in an image, before a reward believes it.

    python -m mlalign.rewards._presence DETECTOR INSTANCES.json IMAGES/

Counted is every pair of an image and a class of the coco vocabulary that the detector knows, with
the best score of the class in the image, as ``object_checker`` asks for it. At a threshold

    precision = present at or above it / at or above it
    recall    = present at or above it / present

Present is what the COCO annotation file has an instance of. The last column is the share of what is
present that ``absent`` set to this threshold would call absent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlalign.objects import vocabulary
from mlalign.records import Example, Facts, ImageRef, ObjectFact
from mlalign.rewards._detector import Detector, Sightings, find_detector

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


class Row(NamedTuple):
    """What a threshold is worth."""

    threshold: float
    precision: float
    """NaN where nothing reaches the threshold."""
    recall: float
    missed: float
    """Share of what is present whose score is at most the threshold."""


def presence(detector: Detector, examples: Sequence[Example]) -> tuple[list[Row], int, int]:
    """A row per threshold, pairs counted, and how many of them are present.

    Raises ValueError where nothing that the detector knows is present in any image.
    """
    words = vocabulary("coco")
    sightings = Sightings(detector, words)
    pairs = []
    for example in examples:
        there = {words.canonical(name) or name for name in example.facts.names()}
        for name in sorted(words.names):
            score = sightings.score(example, name)
            if score is not None:
                pairs.append((score, name in there))
    present = [score for score, is_there in pairs if is_there]
    if not present:
        raise ValueError("nothing that the detector knows is present in any image")
    rows = []
    for threshold in THRESHOLDS:
        said = [is_there for score, is_there in pairs if score >= threshold]
        precision = sum(said) / len(said) if said else float("nan")
        missed = sum(score <= threshold for score in present) / len(present)
        rows.append(Row(threshold, precision, sum(said) / len(present), missed))
    return rows, len(pairs), len(present)


def coco_examples(instances: Path, images: Path) -> list[Example]:
    """Images of a COCO annotation file with the names of their instances, boxes left out."""
    raw = json.loads(instances.read_text(encoding="utf-8"))
    names = {each["id"]: each["name"] for each in raw["categories"]}
    found: dict[int, list[ObjectFact]] = {each["id"]: [] for each in raw["images"]}
    for each in raw["annotations"]:
        found[each["image_id"]].append(ObjectFact(name=names[each["category_id"]]))
    return [
        Example(
            id=each["file_name"],
            image=ImageRef(path=str(images / each["file_name"])),
            image_sha256="",
            prompt="Describe this image.",
            facts=Facts(objects=tuple(found[each["id"]])),
            source="coco",
        )
        for each in raw["images"]
    ]


def main(argv: Sequence[str]) -> int:
    """Print the table; status 2 with the usage where the arguments are others."""
    if len(argv) != 3:
        print("python -m mlalign.rewards._presence DETECTOR INSTANCES.json IMAGES/")
        return 2
    examples = coco_examples(Path(argv[1]), Path(argv[2]))
    rows, pairs, present = presence(find_detector(argv[0]), examples)
    print(f"{len(examples)} images, {pairs} pairs of image and class, {present} present")
    print("| threshold | precision | recall | present, at most the threshold |")
    print("|---|---|---|---|")
    for row in rows:
        print(f"| {row.threshold:g} | {row.precision:.3f} | {row.recall:.3f} | {row.missed:.3f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
