"""LLaVA-RLHF's prompts for PPO (Sun et al., 2309.14525): zhiqings/LLaVA-RLHF-Data.

``llava_ppo50k-aokvqa12k-vqa10k.json`` is a JSON list of ``image, conversations, caption_type,
length_bonus``: 50,000 conversations of LLaVA, 12,000 questions of A-OKVQA, 10,000 yes/no questions
of VQA, all on COCO train2017. The prompt is the first question of the conversation; its answers and
later turns are not read, as released.

``caption_type`` says what is asked: 1 anything, 2 to 5 a choice whose right option is A to D, 6 and
7 a question whose answer is No and Yes. It becomes ``facts.answer``. ``length_bonus`` multiplies
the length penalty. Both are 1 where a row has none. ``captions`` gives what the reward model is
shown: five captions of the image, and for a choice the rationales of A-OKVQA in their place.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from data_builders.sources._common import check_split, faulty, hash_share
from data_builders.sources._fields import image_of, number_of, value_of
from data_builders.sources._released import Released, Row, locate, rows_of
from data_builders.sources.llava_rlhf import Captions
from data_builders.sources.povid import turns_of
from mlalign.records import Example, Facts, RecordError, Skip
from mlalign.store import fingerprint

NAME = "llava_rlhf_prompts"
PATTERNS = ("*ppo*.json", "*ppo*.jsonl")
GOLD = {1: None, 2: "A", 3: "B", 4: "C", 5: "D", 6: "No", 7: "Yes"}
"""Answer by caption_type."""
OPTIONS = "ABCD"


class Settings(Released):
    """Where the release and its images lie, and what is kept for other splits."""

    images: str
    """Folder of the images: COCO train2017."""
    captions: str | None = None
    """The release's ``image_to_caption.json``; a row without an entry is then left out, counted.
    None: prompts without captions."""
    heldout_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images, by a hash of their names, that are held out; the release holds none."""
    probe_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images that are kept for probes."""


class LlavaRlhfPrompts:
    """The source."""

    Settings = Settings
    language = "english"
    vocabulary = "coco"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._captions = Captions(settings.captions)
        self._rows: list[tuple[str, Row]] | None = None
        self._files: list[Path] | None = None

    def examples(
        self, split: str, limit: int | None, seed: int, start: int = 0
    ) -> Iterator[Example | Skip]:
        """The prompts of a split in the seed's order; an image is opened when its turn comes.
        Raises SourceError where the release cannot be read."""
        check_split(split, NAME)
        rows = [each for each in self._read() if self._split_of(each[1].value) == split]
        random.Random(f"order/{seed}").shuffle(rows)
        for record_id, row in rows[start:limit]:
            try:
                yield self._example(record_id, row.value)
            except RecordError as error:
                skip = faulty(error)
                yield Skip(id=record_id, reason=skip.reason, detail=f"{row.where}: {skip.detail}")

    def fingerprint(self) -> dict[str, Any]:
        """What was read: the settings, and each file's hash."""
        return {
            "source": NAME,
            **self.settings.model_dump(mode="json"),
            "files_sha256": {file.name: fingerprint(file) for file in self._found()},
        }

    def _example(self, record_id: str, row: Any) -> Example:
        if not isinstance(row, dict):
            problem = f"is {type(row).__name__}, not a mapping of keys"
            raise RecordError(record_id, "row", problem, "Mend or remove the row")
        kind = row.get("caption_type")
        kind = 1 if kind is None else kind
        if type(kind) is not int or kind not in GOLD:
            raise RecordError(record_id, "caption_type", "none of 1 to 7", "Mend or remove the row")
        bonus = row.get("length_bonus")
        named = value_of(row, "image", record_id)
        prompt = turns_of(row, "conversations", record_id)[0][0]
        gold = GOLD[kind]
        known = self._captions.of(named, "aok_" if gold and gold in OPTIONS else "")
        if self.settings.captions is not None and not known:
            raise RecordError(record_id, "captions", "none for this image", "Add them to the file")
        image, digest = image_of(named, record_id, self.settings.images)
        return Example(
            id=record_id,
            image=image,
            image_sha256=digest,
            prompt=prompt,
            facts=Facts(captions=known, answer=gold),
            source=NAME,
            length_bonus=1.0 if bonus is None else number_of(bonus, "length_bonus", record_id),
        )

    def _split_of(self, row: Any) -> str:
        """By the image alone, so that no image is in two splits."""
        held, probe = self.settings.heldout_share, self.settings.probe_share
        share = hash_share(str(row.get("image"))) if isinstance(row, dict) else 1.0
        return "heldout" if share < held else "probe" if share < held + probe else "train"

    def _read(self) -> list[tuple[str, Row]]:
        """(id, row) in the file's order; an id that an earlier row has gets ".2" and so on."""
        if self._rows is None:
            self._rows, seen = [], Counter[str]()
            for file in self._found():
                for row in rows_of(file):
                    own = row.value.get("id") if isinstance(row.value, dict) else None
                    record_id = f"{NAME}-{f'row{row.number}' if own is None else own}"
                    seen[record_id] += 1
                    again = f".{seen[record_id]}" if seen[record_id] > 1 else ""
                    self._rows.append((record_id + again, row))
        return self._rows

    def _found(self) -> list[Path]:
        if self._files is None:
            self._files = locate(self.settings.path, PATTERNS, self.settings.revision)
        return self._files


METHOD = LlavaRlhfPrompts
