"""A preference file as ms-swift takes it: ``messages``, ``rejected_response``, ``images``.

``messages`` is ``[{role: user, content}, {role: assistant, content}]``, the last one chosen;
``rejected_response`` is the rejected text, or a list with the one message of it;
``rejected_messages`` holds the whole rejected chat instead. ``rejected_images`` beside
``rejected_response`` is another image for the rejected side; beside ``rejected_messages``, ms-swift
wants the image there again, and it makes a difference only where it is another.

Relative image paths start at ``images``, or at the folder of the file. (ms-swift itself starts at
the folder that it was called in.) A system text or earlier turns are faults: a record is one
question.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_builders.sources._fields import as_text, image_of, question_of, text_of, value_of
from data_builders.sources._released import PairSource, Released, folder_of
from mlalign.records import Preference, RecordError, Skip


class Settings(Released):
    """Where the file lies."""

    images: str | None = None
    """Folder that relative image paths start from; None: the folder of the file."""


class MsSwift(PairSource):
    """The source."""

    Settings = Settings
    name = "ms_swift"
    patterns = ("*.jsonl", "*.json", "*.parquet")

    def key(self, row: dict[str, Any]) -> Any:
        return row.get("id")

    def made(self, row: dict[str, Any], record_id: str) -> Iterator[Preference | Skip]:
        """One pair."""
        prompt, chosen = _turn(value_of(row, "messages", record_id), "messages", record_id)
        rejected = _rejected(row, prompt, record_id)
        folder = self.settings.images or folder_of(self.files())
        given = value_of(row, "images", record_id)
        image, digest = image_of(given, record_id, folder, own=True)
        other = None
        if row.get("rejected_images"):
            other, other_digest = image_of(row["rejected_images"], record_id, folder, own=True)
            other = None if other_digest == digest else other
        yield Preference(
            id=record_id,
            image=image,
            image_sha256=digest,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            rejected_image=other,
            origin=self.origin(row=row.get("id")),
        )


def _turn(messages: Any, key: str, record_id: str) -> tuple[str, str]:
    """Question and answer of a chat of one turn. Raises RecordError."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RecordError(record_id, key, "is not a list of messages", "Mend or remove the row")
    if [m.get("role") for m in messages] != ["user", "assistant"]:
        problem = "is not one user and one assistant message"
        raise RecordError(record_id, key, problem, "Mend or remove the row")
    question, answer = (text_of(message, "content", record_id) for message in messages)
    return question_of(question, key, record_id), answer


def _rejected(row: dict[str, Any], prompt: str, record_id: str) -> str:
    if row.get("rejected_response") is None:
        key = "rejected_messages"
        if row.get(key) is None:
            raise RecordError(record_id, "rejected_response", "missing", "Mend or remove the row")
        question, answer = _turn(row[key], key, record_id)
        if question != prompt:
            raise RecordError(record_id, key, "asks another question", "Mend or remove the row")
        return answer
    said = row["rejected_response"]
    if isinstance(said, list) and len(said) == 1 and isinstance(said[0], dict):
        return text_of(said[0], "content", record_id)
    return as_text(said, "rejected_response", record_id)


METHOD = MsSwift
