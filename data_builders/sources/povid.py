"""POVID's pairs (Zhou et al., 2402.11411): YiyangAiLab/POVID_preference_data_for_VLLMs, 17,184.

A JSON list of ``id, image, conversations, rejected_conversations``, each conversation a list of
``{from: human | gpt, value}``; the chosen one is LLaVA-Instruct's gold answer, the rejected one
was corrupted by a model that saw the image. ``image`` names a file of COCO train2014. The release
renamed its file (``..._version_1.json``), the scripts still name the old one: the new one is read
where both lie in the folder. CSR, STIC and SIMA released the same shape.

The pair is one question and its two answers, without what was said before it. A row of several
questions is left out (counted), or its first question taken: ``turns``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from data_builders.sources._fields import as_text, image_of, question_of, value_of
from data_builders.sources._released import PairSource, Released
from mlalign.records import Preference, RecordError, Skip

MANY = "several questions"

Turns = list[tuple[str, str]]


class Settings(Released):
    """Where the release and its images lie, and what a row of several questions gives."""

    images: str
    """Folder of the images: COCO train2014."""
    turns: Literal["one", "first"] = "one"
    """one: a row of several questions is left out; first: its first question is taken."""


class Povid(PairSource):
    """The source."""

    Settings = Settings
    name = "povid"
    patterns = ("*_version_1.json", "*.json", "*.jsonl", "*.parquet")
    expected = frozenset({f"conversations: {MANY}"})

    def key(self, row: dict[str, Any]) -> Any:
        return row.get("id")

    def made(self, row: dict[str, Any], record_id: str) -> Iterator[Preference | Skip]:
        """One pair."""
        ours = turns_of(row, "conversations", record_id)
        theirs = turns_of(row, "rejected_conversations", record_id)
        if len(ours) > 1 and self.settings.turns == "one":
            mend = "Set turns: first to take the first of them"
            raise RecordError(record_id, "conversations", MANY, mend)
        prompt, chosen = ours[0]
        other, rejected = theirs[0]
        if other != prompt:
            raise RecordError(
                record_id,
                "rejected_conversations",
                "asks another question",
                "A pair answers one question twice; mend or remove the row",
            )
        image, digest = image_of(value_of(row, "image", record_id), record_id, self.settings.images)
        yield Preference(
            id=record_id,
            image=image,
            image_sha256=digest,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            origin=self.origin(row=row.get("id"), image=row["image"], turns=len(ours)),
        )


def turns_of(row: dict[str, Any], key: str, record_id: str) -> Turns:
    """(question, answer) of every turn. Raises RecordError."""
    said = value_of(row, key, record_id)
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise RecordError(record_id, key, "is not a list of turns", "Mend or remove the row")
    if not said or [t.get("from") for t in said] != ["human", "gpt"] * (len(said) // 2):
        problem = "human and gpt do not take turns"
        raise RecordError(record_id, key, problem, "Mend or remove the row")
    texts = [as_text(turn.get("value"), key, record_id) for turn in said]
    questions = [question_of(text, key, record_id) for text in texts[::2]]
    return list(zip(questions, texts[1::2], strict=True))


METHOD = Povid
