"""The fixed probe set: real completions with the facts of their images, and where the words stand.

A probe set is written once and never changes, so that a number at step 100 and one at step 0 are
of the same tokens. Its fingerprint goes into the run's manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mlalign.models._offsets import token_offsets
from mlalign.records import Facts, ImageRef, RecordError, facts_from_json, to_json
from mlalign.store import folder_atomic

COMPLETIONS = ("own", "chosen", "rejected")
"""Order of the completions in a probe row."""


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """One image and prompt with three answers: the base model's own, and a preference pair."""

    id: str
    image: ImageRef
    prompt: str
    own: str
    """What the base model itself answers, greedy."""
    chosen: str
    rejected: str
    facts: Facts

    def __post_init__(self) -> None:
        for key in ("prompt", *COMPLETIONS):
            if not getattr(self, key).strip():
                raise RecordError(self.id, key, "empty", "Leave the record out of the probe set")

    @property
    def texts(self) -> tuple[str, str, str]:
        """The completions in the order of ``COMPLETIONS``."""
        return self.own, self.chosen, self.rejected


@dataclass(frozen=True, kw_only=True)
class Mention:
    """An object word of a completion, true or not, and the tokens that spell it."""

    name: str
    """Canonical name."""
    real: bool
    """It is among the facts. False only where the facts are exhaustive or name no such object."""
    start: int
    end: int
    """Characters [start, end) of the text."""
    tokens: tuple[int, ...]
    """Positions among the completion's tokens."""


class FindsObjects(Protocol):
    """What the probes need of a vocabulary."""

    def objects(self, text: str) -> Sequence[Any]:
        """Spans with ``name``, ``start`` and ``end``."""
        ...


def mentions(
    text: str, facts: Facts, vocabulary: FindsObjects, tokenizer: Any, ids: Sequence[int], name: str
) -> list[Mention]:
    """The object words of ``text``, marked real or absent by the facts, with their tokens.

    ``ids``: tokens of the completion, end of turn included. ``name``: record id for the error.
    Raises RecordError where there are some and the tokens do not spell the text (an unknown word).
    """
    present = facts.names()
    found = []
    spans = vocabulary.objects(text)
    offsets = token_offsets(tokenizer, ids, text, name) if spans else ()
    for span in spans:
        tokens = _within(offsets, text, span.start, span.end)
        found.append(
            Mention(
                name=span.name,
                real=span.name in present,
                start=span.start,
                end=span.end,
                tokens=tokens,
            )
        )
    return found


def tokens_of_span(
    tokenizer: Any, ids: Sequence[int], text: str, start: int, end: int, name: str
) -> tuple[int, ...]:
    """Positions in ``ids`` of the tokens that spell characters [start, end) of ``text``.

    Raises RecordError where the tokens do not spell the text (an unknown word).
    """
    return _within(token_offsets(tokenizer, ids, text, name), text, start, end)


def _within(offsets: Sequence[tuple[int, int]], text: str, start: int, end: int) -> tuple[int, ...]:
    """Tokens of which a character lies in [start, end); the span's own outer blanks are none."""
    said = text[start:end]
    start, end = start + len(said) - len(said.lstrip()), start + len(said.rstrip())
    return tuple(i for i, (first, last) in enumerate(offsets) if first < end and start < last)


def save(folder: str | Path, records: Iterable[ProbeRecord]) -> str:
    """Write records and their images whole or not at all; returns the fingerprint."""
    lines = []
    with folder_atomic(folder) as aside:
        (aside / "images").mkdir()
        for record in records:
            data = record.image.read()
            digest = hashlib.sha256(data).hexdigest()
            file = f"images/{digest}{Path(record.image.path or '.png').suffix or '.png'}"
            (aside / file).write_bytes(data)
            value = to_json(replace(record, image=ImageRef(path=file)))
            lines.append(json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n")
        if not lines:
            raise ValueError(f"{folder}: a probe set needs at least one record")
        (aside / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    return fingerprint(folder)


def load(folder: str | Path) -> list[ProbeRecord]:
    """The records that ``save`` wrote, in order. Raises RecordError for an image that changed."""
    records = []
    for line in (Path(folder) / "records.jsonl").read_text(encoding="utf-8").splitlines():
        value = json.loads(line)
        image = ImageRef(path=str(Path(folder) / value.pop("image")["path"]))
        record = ProbeRecord(image=image, facts=facts_from_json(value.pop("facts")), **value)
        if not image.path or Path(image.path).stem != image.sha256():
            raise RecordError(
                record.id, "image", f"{image.path} changed", "Write the probe set again"
            )
        records.append(record)
    return records


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over the records; images are in it, since they are named by their own digests."""
    return hashlib.sha256((Path(folder) / "records.jsonl").read_bytes()).hexdigest()
