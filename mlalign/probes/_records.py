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

from mlalign.records import Facts, ImageRef, RecordError, facts_from_json, to_json
from mlalign.store import folder_atomic

COMPLETIONS = ("own", "chosen", "rejected")
"""Order of the completions in a probe row."""
BROKEN = "\ufffd"
"""What decoders write for a character of which bytes are missing."""


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
    """
    present = facts.names()
    found = []
    for span in vocabulary.objects(text):
        tokens = tokens_of_span(tokenizer, ids, text, span.start, span.end, name)
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

    Works by decoding ever longer prefixes and counting the characters that are not blanks: so
    neither a tokenizer's leading blank, nor byte pieces, nor a word-level decoder's spacing
    matters. Raises RecordError where the tokens do not spell the text (an unknown word).
    """
    whole = [c for c in _decode(tokenizer, ids) if not c.isspace()]
    wanted = [c for c in text if not c.isspace()]
    if len(whole) != len(wanted):
        raise RecordError(
            name,
            "text",
            f"{text!r} decodes as {_decode(tokenizer, ids)!r}, so its words have no tokens",
            "Use text that the tokenizer can spell",
        )
    first = sum(not c.isspace() for c in text[:start])
    last = first + sum(not c.isspace() for c in text[start:end])
    hit = []
    complete = 0
    for position in range(len(ids)):
        prefix = _decode(tokenizer, ids[: position + 1])
        # Byte pieces end in the middle of a character; decoding marks it at the end. Each of
        # them spells that character.
        broken = prefix.endswith(BROKEN) and position + 1 < len(ids)
        whole_now = sum(not c.isspace() for c in prefix.rstrip(BROKEN if broken else ""))
        if complete < last and whole_now + broken > first:
            hit.append(position)
        complete = whole_now
    return tuple(hit)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


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
