"""The records that every room passes on: what is known of an image, and what was made of it.

A record's ``id`` never changes from source to log, so that any number can be walked back to it.
All records are frozen, validate themselves on creation, and go to and from plain JSON values by
``to_json`` and ``from_json``. Standard library only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

IMAGE_TOKEN = "<image>"
"""What marks the image in neighbours' formats. A prompt of ours never contains it: the family's
chat template places the image."""


class RecordError(ValueError):
    """A record that cannot be used. The message names the record id, the key and the mend."""

    def __init__(self, record_id: str, key: str, problem: str, mend: str) -> None:
        super().__init__(f"record {record_id!r}, {key}: {problem}. {mend}")
        self.record_id = record_id
        self.key = key
        self.reason = f"{key}: {problem}"


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """An encoded image (PNG, JPEG...): a file, or bytes held in memory (a Parquet cell)."""

    path: str | None = None
    """File that holds it; with ``data``, the name it had."""
    data: bytes | None = None
    """The encoded bytes, where the image does not lie in a file of its own."""

    def __post_init__(self) -> None:
        if self.path is None and self.data is None:
            raise ValueError("ImageRef needs a path or data")

    def read(self) -> bytes:
        """The encoded bytes. Raises OSError where the file cannot be read."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        return Path(self.path).read_bytes()

    def sha256(self) -> str:
        """Hex digest of the encoded bytes."""
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ObjectFact:
    """One thing in the image."""

    name: str
    """Canonical object word (CHAIR's node word for COCO classes)."""
    box: tuple[float, float, float, float] | None = None
    """x0, y0, x1, y1 in pixels of the image as stored; None where only presence is known."""
    attributes: tuple[str, ...] = ()
    """Colours and the like."""
    position: str | None = None
    """Where it is, in the source's own words ("top left"); None where unknown."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of an image."""

    objects: tuple[ObjectFact, ...] = ()
    captions: tuple[str, ...] = ()
    """Reference captions, true as far as the source knows."""
    answer: str | None = None
    """The true answer to the example's prompt, where there is one."""
    scene: str | None = None
    """Kind of scene, where the source knows it."""
    exhaustive: bool = False
    """True: an object of the source's vocabulary that is not listed is absent. False (captions):
    it may still be there."""

    def names(self) -> frozenset[str]:
        """The canonical names of the objects present."""
        return frozenset(o.name for o in self.objects)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image and one prompt, with the facts that a source has of it."""

    id: str
    image: ImageRef
    image_sha256: str
    prompt: str
    facts: Facts
    source: str
    """Name of the source that read it."""
    length_bonus: float = 1.0
    """What a penalty on the length of an answer is multiplied by (LLaVA-RLHF's data say so)."""

    def __post_init__(self) -> None:
        _check_text(self.id, "prompt", self.prompt)


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """One image with question and answer turns: what the SFT stage trains on."""

    id: str
    image: ImageRef
    image_sha256: str
    turns: tuple[tuple[str, str], ...]
    """(user text, assistant text) pairs; the image belongs to the first user text."""
    source: str

    def __post_init__(self) -> None:
        if not self.turns:
            raise RecordError(self.id, "turns", "no turn", "Give at least one (user, assistant)")
        for user, assistant in self.turns:
            _check_text(self.id, "turns.user", user)
            _check_text(self.id, "turns.assistant", assistant)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A span of characters of one answer with a label and a weight."""

    side: Literal["chosen", "rejected"]
    start: int
    end: int
    """Characters [start, end) of that side's text."""
    label: str
    """What the span is: "object", "attribute", "relation", "edit"..."""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of an answer, asked of a judge as a yes/no question."""

    side: str
    """Which answer makes it: "chosen", "rejected", or a sample's number as text."""
    text: str
    question: str
    p_yes: float
    p_no: float
    """Probabilities of the two answers; they need not sum to one."""
    verdict: Literal["yes", "no"]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """One preference pair."""

    id: str
    image: ImageRef
    image_sha256: str
    prompt: str
    chosen: str
    rejected: str
    segments: tuple[Segment, ...] = ()
    claims: tuple[Claim, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    """Builder's scores, keys like "chosen", "rejected"."""
    rejected_image: ImageRef | None = None
    """Another image for the rejected side (mDPO and its kin)."""
    facts: Facts = field(default_factory=Facts)
    """Facts of the image, for probes and evaluation; never read by an objective."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: source, builder, how (rule or model), seed, example id."""

    def __post_init__(self) -> None:
        for key in ("prompt", "chosen", "rejected"):
            _check_text(self.id, key, getattr(self, key))
        if self.chosen.strip() == self.rejected.strip():
            raise RecordError(
                self.id,
                "rejected",
                "equal to chosen, so the pair prefers nothing",
                "Remove the record or give two different answers",
            )
        for segment in self.segments:
            text = self.chosen if segment.side == "chosen" else self.rejected
            if not 0 <= segment.start < segment.end <= len(text):
                raise RecordError(
                    self.id,
                    "segments",
                    f"span {segment.start}:{segment.end} outside {segment.side} "
                    f"of {len(text)} characters",
                    "Spans are characters [start, end) of that side's text",
                )


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a rated answer."""

    start: int
    end: int
    """Characters [start, end) of the answer."""
    label: str
    """What the part is: "sentence"..."""
    weight: float
    """Its score."""


@dataclass(frozen=True, kw_only=True)
class Rated:
    """One answer that people or a judge rated: what a reward model learns from."""

    id: str
    image: ImageRef
    image_sha256: str
    prompt: str
    text: str
    segments: tuple[Span, ...] = ()
    """The rated parts, in text order; empty where only the whole was rated."""
    scores: dict[str, float] = field(default_factory=dict)
    """Scores of the whole by name."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where it comes from, with what else the source says of it."""

    def __post_init__(self) -> None:
        _check_text(self.id, "prompt", self.prompt)
        _check_text(self.id, "text", self.text)
        at = 0
        for span in self.segments:
            if not at <= span.start < span.end <= len(self.text):
                raise RecordError(
                    self.id,
                    "segments",
                    "spans overlap or lie outside the text",
                    "Spans are characters [start, end) of the text, in its order",
                )
            at = span.end


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A record that a source or a builder did not use, and why. Counted, never silent."""

    id: str
    reason: str
    """Short and countable: the same words for the same cause."""
    detail: str = ""


def _check_text(record_id: str, key: str, text: Any) -> None:
    if not isinstance(text, str):
        raise RecordError(record_id, key, f"is {type(text).__name__}, not text", "Give a string")
    if not text.strip():
        raise RecordError(record_id, key, "empty", "Fill it in or remove the record")
    if IMAGE_TOKEN in text:
        raise RecordError(
            record_id,
            key,
            f"contains {IMAGE_TOKEN}",
            "Remove the tag: the chat template places the one image of a record",
        )


def to_json(record: Any) -> dict[str, Any]:
    """A record as plain JSON values. Image bytes are left out: they are stored beside it."""

    def plain(value: Any) -> Any:
        if isinstance(value, ImageRef):
            return {"path": value.path}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    return plain(record)


def facts_from_json(value: dict[str, Any]) -> Facts:
    """``Facts`` from what ``to_json`` made of it."""
    objects = tuple(
        ObjectFact(
            name=o["name"],
            box=tuple(o["box"]) if o.get("box") is not None else None,
            attributes=tuple(o.get("attributes") or ()),
            position=o.get("position"),
        )
        for o in value.get("objects") or ()
    )
    return Facts(
        objects=objects,
        captions=tuple(value.get("captions") or ()),
        answer=value.get("answer"),
        scene=value.get("scene"),
        exhaustive=bool(value.get("exhaustive", False)),
    )


def example_from_json(value: dict[str, Any], image: ImageRef | None = None) -> Example:
    """``Example`` from JSON values; ``image`` stands in for the stored path where given."""
    return Example(
        id=value["id"],
        image=image or ImageRef(path=value["image"]["path"]),
        image_sha256=value["image_sha256"],
        prompt=value["prompt"],
        facts=facts_from_json(value["facts"]),
        source=value["source"],
        length_bonus=float(value.get("length_bonus", 1.0)),
    )


def preference_from_json(value: dict[str, Any], image: ImageRef | None = None) -> Preference:
    """``Preference`` from JSON values; ``image`` stands in for the stored path where given."""
    other = value.get("rejected_image")
    return Preference(
        id=value["id"],
        image=image or ImageRef(path=value["image"]["path"]),
        image_sha256=value.get("image_sha256", ""),
        prompt=value["prompt"],
        chosen=value["chosen"],
        rejected=value["rejected"],
        segments=tuple(Segment(**s) for s in value.get("segments") or ()),
        claims=tuple(Claim(**c) for c in value.get("claims") or ()),
        scores=dict(value.get("scores") or {}),
        rejected_image=ImageRef(path=other["path"]) if other else None,
        facts=facts_from_json(value.get("facts") or {}),
        origin=dict(value.get("origin") or {}),
    )
