"""A folder of photographs with captions: ``images/`` and ``captions.jsonl`` beside it.

Each line of ``captions.jsonl`` is ``{"image": file name, "captions": [text, ...]}``. An object
counts as present where any caption names it, by the vocabulary; its attributes are those that any
caption gives it. What no caption names may still be in the photograph (``exhaustive=False``).

Splits: ``train.txt`` and ``dev.txt`` (file names, one per line) where both are there, else by a
hash of the file name. "probe" is cut from the end of the training list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data_builders._phrases import phrases, tidy
from data_builders.sources._common import (
    check_split,
    checked_image,
    cut_probe,
    hash_share,
    shuffled,
)
from mlalign.objects import vocabulary
from mlalign.records import Example, Facts, ObjectFact, Skip
from mlalign.store import fingerprint

PROMPTS = (
    "Describe this image in detail.",
    "What is shown in this image?",
    "Please describe the image.",
    "Write a caption for this photo.",
    "Tell me what you see in the image.",
)


class Settings(BaseModel):
    """Where the photographs are and how they are split."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    folder: str
    """Folder with ``images/`` and ``captions.jsonl``."""
    images: str = "images"
    """Folder of the image files, inside ``folder``."""
    captions: str = "captions.jsonl"
    """Caption file, inside ``folder``."""
    train_list: str = "train.txt"
    """List of training images, inside ``folder``; without both lists a hash decides."""
    heldout_list: str = "dev.txt"
    """List of held-out images, inside ``folder``."""
    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the images that the hash holds out where there are no lists."""
    probe: int = Field(default=64, ge=0)
    """Images at the end of the training list that are kept for probes."""
    vocabulary: str = "coco"
    """Object vocabulary: a name or a file."""
    prompts: tuple[str, ...] = PROMPTS[:1]
    """Requests for a description; each image gets one of them by a hash of its name."""


class PhotoFolder:
    """The source."""

    Settings = Settings
    language = "english"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.vocabulary = settings.vocabulary
        self._folder = Path(settings.folder).expanduser()
        self._captions_file = self._folder / settings.captions
        if not self._captions_file.is_file():
            raise ValueError(
                f"data.source.folder: {self._captions_file} does not exist. Give a folder with "
                f"{settings.images}/ and {settings.captions}"
            )
        self._rows: dict[str, Any] | None = None

    def examples(
        self, split: str, limit: int | None, seed: int, start: int = 0
    ) -> Iterator[Example | Skip]:
        """The photographs of a split in the seed's order, each opened once when its turn comes."""
        check_split(split, "photo_folder")
        names = shuffled(self.names(split), seed)
        for name in names[start:limit]:
            yield self._example(name)

    def names(self, split: str) -> list[str]:
        """File names of a split, in the list's order."""
        check_split(split, "photo_folder")
        lists = [self._folder / f for f in (self.settings.train_list, self.settings.heldout_list)]
        if all(path.is_file() for path in lists):
            train, heldout = (path.read_text(encoding="utf-8").split() for path in lists)
            if both := sorted(set(train) & set(heldout)):
                raise ValueError(
                    f"{lists[0]} and {lists[1]} both list {both[0]} and {len(both) - 1} more: "
                    "an image belongs to one split only"
                )
        else:
            known = sorted(self._read())
            held = self.settings.heldout_share
            train = [name for name in known if hash_share(name) >= held]
            heldout = [name for name in known if hash_share(name) < held]
        if split == "heldout":
            return heldout
        return cut_probe(train, self.settings.probe, split, "photo_folder")

    def fingerprint(self) -> dict[str, Any]:
        """What was read: the caption file's hash and the numbers of images."""
        return {
            "source": "photo_folder",
            **self.settings.model_dump(mode="json"),
            "captions_sha256": fingerprint(self._captions_file),
        }

    def _example(self, name: str) -> Example | Skip:
        record_id = Path(name).stem
        captions = self._read().get(name)
        if captions is None:
            return Skip(
                id=record_id, reason="no captions", detail=f"{self._captions_file}: no {name}"
            )
        if not captions:
            return Skip(
                id=record_id,
                reason="captions are not a list of texts",
                detail=f"{self._captions_file}, {name}: give a list with at least one text",
            )
        image = checked_image(str(self._folder / self.settings.images / name), record_id)
        if isinstance(image, Skip):
            return image
        prompts = self.settings.prompts
        return Example(
            id=record_id,
            image=image[0],
            image_sha256=image[1],
            prompt=prompts[int(hash_share(name) * len(prompts))],
            facts=facts_of(captions, vocabulary(self.settings.vocabulary)),
            source="photo_folder",
        )

    def _read(self) -> dict[str, list[str]]:
        """Captions by image; an empty list where a line's captions cannot be used."""
        if self._rows is None:
            self._rows = {}
            with self._captions_file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                        name, texts = row["image"], row["captions"]
                    except (json.JSONDecodeError, KeyError, TypeError) as error:
                        raise ValueError(
                            f"{self._captions_file}, line {number}: {error!r}. Each line is "
                            '{"image": file name, "captions": [text, ...]}'
                        ) from error
                    usable = isinstance(texts, list) and all(isinstance(t, str) for t in texts)
                    self._rows[name] = [t for t in texts if t.strip()] if usable else []
        return self._rows


def facts_of(captions: Sequence[str], words: Any) -> Facts:
    """What captions say of their image: objects by name, with every attribute given to them."""
    looks: dict[str, dict[str, None]] = {}
    for caption in captions:
        for span in words.objects(caption):
            looks.setdefault(span.name, {})
        for phrase in phrases(caption, words):
            looks[phrase.name].update(dict.fromkeys(a.name for a in phrase.attributes))
    return Facts(
        objects=tuple(ObjectFact(name=n, attributes=tuple(looks[n])) for n in sorted(looks)),
        captions=tuple(tidy(caption) for caption in captions),
        exhaustive=False,
    )


METHOD = PhotoFolder
