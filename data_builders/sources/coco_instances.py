"""COCO instances: a folder of images, an annotation JSON with boxes, captions where there are some.

Boxes are turned from (x, y, width, height) into (x0, y0, x1, y1) pixels. Crowds (``iscrowd``) say
that a class is there but not where, so they have no box. The classes of the file are complete: one
that is not listed is absent (``exhaustive=True``). Splits by a hash of the file name; "probe" is
cut from the end of the training images.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data_builders._phrases import tidy
from data_builders.sources._common import (
    check_split,
    checked_image,
    cut_probe,
    hash_share,
    shuffled,
)
from data_builders.sources.photo_folder import PROMPTS, facts_of
from mlalign.objects import vocabulary
from mlalign.records import Example, Facts, ObjectFact, Skip
from mlalign.store import fingerprint


class Settings(BaseModel):
    """Where the annotations and images are."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    instances: str
    """COCO instances JSON."""
    images: str
    """Folder of the image files."""
    captions: str | None = None
    """COCO captions JSON of the same images; None: no reference captions (povid needs them)."""
    heldout_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the images that the hash holds out."""
    probe: int = Field(default=16, ge=0)
    """Training images that are kept for probes."""
    vocabulary: str = "coco"
    """Object vocabulary: a name or a file; its names are the classes'."""
    prompts: tuple[str, ...] = PROMPTS[:1]
    """Requests for a description; each image gets one of them by a hash of its name."""


class CocoInstances:
    """The source."""

    Settings = Settings
    language = "english"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.vocabulary = settings.vocabulary
        self._file = Path(settings.instances).expanduser()
        raw = _read(self._file, ("images", "annotations", "categories"), "instances")
        words = vocabulary(settings.vocabulary)
        self._classes = {
            c["id"]: words.canonical(c["name"]) or c["name"] for c in raw["categories"]
        }
        self._images = {image["file_name"]: image for image in raw["images"]}
        self._boxes: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in raw["annotations"]:
            self._boxes[annotation["image_id"]].append(annotation)
        self._captions: dict[int, list[str]] = defaultdict(list)
        if settings.captions is not None:
            path = Path(settings.captions).expanduser()
            for row in _read(path, ("annotations",), "captions")["annotations"]:
                self._captions[row["image_id"]].append(row["caption"])

    def examples(
        self, split: str, limit: int | None, seed: int, start: int = 0
    ) -> Iterator[Example | Skip]:
        """The images of a split in the seed's order, each opened once when its turn comes."""
        check_split(split, "coco_instances")
        for name in shuffled(self.names(split), seed)[start:limit]:
            yield self._example(name)

    def names(self, split: str) -> list[str]:
        """File names of a split."""
        check_split(split, "coco_instances")
        known = sorted(self._images)
        if split == "heldout":
            return [name for name in known if hash_share(name) < self.settings.heldout_share]
        train = [name for name in known if hash_share(name) >= self.settings.heldout_share]
        return cut_probe(train, self.settings.probe, split, "coco_instances")

    def fingerprint(self) -> dict[str, Any]:
        """What was read: the annotation file's hash and the number of images."""
        return {
            "source": "coco_instances",
            **self.settings.model_dump(mode="json"),
            "images_listed": len(self._images),
            "instances_sha256": fingerprint(self._file),
        }

    def _example(self, name: str) -> Example | Skip:
        record_id = Path(name).stem
        row = self._images[name]
        image = checked_image(str(Path(self.settings.images).expanduser() / name), record_id)
        if isinstance(image, Skip):
            return image
        objects, unknown = [], []
        for annotation in self._boxes[row["id"]]:
            label = self._classes.get(annotation["category_id"])
            if label is None:
                unknown.append(annotation["category_id"])
                continue
            objects.append(ObjectFact(name=label, box=_corners(annotation)))
        if unknown:
            return Skip(
                id=record_id,
                reason="annotation of an unknown category",
                detail=f"{self._file}: category_id {unknown[0]} is not among the categories",
            )
        prompts = self.settings.prompts
        return Example(
            id=record_id,
            image=image[0],
            image_sha256=image[1],
            prompt=prompts[int(hash_share(name) * len(prompts))],
            facts=self._facts(objects, self._captions[row["id"]]),
            source="coco_instances",
        )

    def _facts(self, objects: list[ObjectFact], captions: list[str]) -> Facts:
        """Boxes, and what the captions add: attributes, and objects that no box was drawn for."""
        said = {o.name: o for o in facts_of(captions, vocabulary(self.settings.vocabulary)).objects}
        seen = {o.name for o in objects}
        boxed = [
            ObjectFact(
                name=o.name, box=o.box, attributes=said[o.name].attributes if o.name in said else ()
            )
            for o in objects
        ]
        return Facts(
            objects=(*boxed, *(o for name, o in said.items() if name not in seen)),
            captions=tuple(tidy(caption) for caption in captions),
            exhaustive=True,
        )


def _corners(annotation: dict[str, Any]) -> tuple[float, float, float, float] | None:
    if annotation.get("iscrowd"):
        return None
    x, y, width, height = annotation["bbox"]
    return float(x), float(y), float(x + width), float(y + height)


def _read(path: Path, keys: tuple[str, ...], setting: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{setting}: cannot read {path} ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{setting}: {path} is not JSON: {error}") from error
    missing = [key for key in keys if key not in raw]
    if missing:
        raise ValueError(f"{setting}: {path} has no {missing[0]!r}; give COCO's own format")
    return raw


METHOD = CocoInstances
