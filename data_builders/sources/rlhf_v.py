"""RLHF-V's human corrections (Yu et al., 2312.00849): openbmb/RLHF-V-Dataset, 5,733 pairs.

Parquet rows ``ds_name, image{bytes, path}, text, origin_dataset, origin_split, idx, image_path``;
``text`` is a JSON string with ``question``, ``chosen`` and ``rejected``. The chosen answer is the
rejected one with its wrong parts rewritten, so what differs is found again by comparing the two
and kept as segments of weight 1 (``data_builders.edits``); what an edit weighs is the objective's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from data_builders.edits import edit_segments, words
from data_builders.sources._fields import image_of, json_of, question_of, text_of, told
from data_builders.sources._released import PairSource, Released
from mlalign.records import Preference, Skip

IMAGE_TOKEN = "<image>"
"""No word of an answer."""


class Settings(Released):
    """Where the release lies, and what counts as an edit."""

    images: str | None = None
    """Folder where ``image_path`` is looked up in a row without image bytes."""
    min_match: int = Field(default=3, ge=1)
    """Fewest words between two edits that count as unchanged."""
    one_sided: bool = False
    """Mark also words that were only added or only taken away; the released code does not."""
    as_released: bool = False
    """Compare whole rows as the released code does, with difflib's autojunk; edits get longer."""
    image_tokens: int = Field(default=576, ge=0)
    """Image tokens of such a row."""


class RlhfV(PairSource):
    """The source."""

    Settings = Settings
    name = "rlhf_v"
    patterns = ("*.parquet", "*.jsonl", "*.json")

    def key(self, row: dict[str, Any]) -> Any:
        return row.get("idx")

    def made(self, row: dict[str, Any], record_id: str) -> Iterator[Preference | Skip]:
        """One pair."""
        settings = self.settings
        said = json_of(row, "text", record_id)
        prompt = question_of(text_of(said, "question", record_id), "question", record_id)
        chosen, rejected = (text_of(said, side, record_id) for side in ("chosen", "rejected"))
        given = row.get("image") if row.get("image") is not None else row.get("image_path")
        image, digest = image_of(given, record_id, settings.images)
        row_start = None
        if settings.as_released:
            row_start = [IMAGE_TOKEN] * settings.image_tokens + words(prompt)
        yield Preference(
            id=record_id,
            image=image,
            image_sha256=digest,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            segments=edit_segments(
                chosen,
                rejected,
                min_match=settings.min_match,
                one_sided=settings.one_sided,
                before=row_start,
            ),
            origin=self.origin(
                row=row.get("idx"),
                dataset=row.get("origin_dataset"),
                split=told(row.get("origin_split")),
                image_path=row.get("image_path"),
            ),
        )


METHOD = RlhfV
