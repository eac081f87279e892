"""The pairs of one arm, row by row: what is wrong with each, and the numbers of their report.

Rows are read one after another; of each, only numbers and digests are kept.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from mlalign.data.collate import TokenisedPair
from mlalign.data.reader import image_fault
from mlalign.models._vlm import VLM
from mlalign.records import ImageRef, Preference
from mlalign.sections import TrainSection
from mlalign.validate.findings import Finding, fault, note
from mlalign.validate.progress import late
from mlalign.validate.rows import count_rows, pair_of, row_fault, rows_of
from mlalign.validate.tokens import Tokens, Unfit


@dataclass
class Place:
    """Where a pair stands."""

    file: str
    row: int
    record: str | None


@dataclass
class PairsRead:
    """What was read of one arm's pairs."""

    arm: str
    path: Path
    rows: int = 0
    usable: int = 0
    segments: int = 0
    """Usable pairs with segments."""
    unit: str = "tokens"
    """Of the lengths: words where the model is not here."""
    prefix: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    edits: list[int] = field(default_factory=list)
    """Runs of words in which the sides of a pair differ."""
    cut: int = 0
    """Usable pairs of which max_length cuts a side."""
    images: dict[str, list[Place]] = field(default_factory=dict)
    """Pairs by the SHA-256 of their image's bytes."""
    reasons: Counter[str] = field(default_factory=Counter)
    sample: TokenisedPair | None = None
    """The first usable pair."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def longest(self) -> tuple[int, int, int] | None:
        """Tokens of prefix, chosen and rejected of the longest pair."""
        lengths = list(zip(self.prefix, self.chosen, self.rejected, strict=self.unit == "tokens"))
        return max(lengths, key=sum, default=None)


class PairsReader:
    """Reads one arm's pairs as training would, and goes on after a fault."""

    def __init__(
        self, arm: str, vlm: VLM | None, train: TrainSection, *, objective: Any, skip: bool
    ) -> None:
        """``objective``: None where it is unknown. ``skip``: the recipe leaves faulty rows out, so
        that they are notes."""
        self.arm, self.train, self.skip = arm, train, skip
        views = getattr(objective, "views", ())
        self.second_image = any(view.image == "record" for view in views)
        self.edits = bool(getattr(objective, "edits", False))
        self.tokens = Tokens(vlm, train, edits=self.edits) if vlm is not None else None
        self._first_id: dict[str, Place] = {}
        self._first_pair: dict[bytes, Place] = {}
        self._paths: dict[str, str] = {}

    def read(self, path: Path) -> PairsRead:
        """All rows of a file or folder. Raises StoreError where there is no record file."""
        out = PairsRead(arm=self.arm, path=path)
        out.unit = "tokens" if self.tokens is not None else "words"
        rows = late(rows_of(path), f"checking {self.arm}", count_rows(path))
        for file, number, row in rows:
            out.rows += 1
            self._row(out, file, number, row)
        self._whole(out)
        return out

    def _row(self, out: PairsRead, file: str, number: int, row: Any) -> None:
        pair, findings, has_image = pair_of(file, number, row)
        own = row.get("id") if isinstance(row, dict) else None
        place = Place(file, number, str(own) if own else None)
        if pair is not None:
            if place.record is not None:
                findings += self._same_id(place)
            digest, found = self._image(pair, place) if has_image else (None, [])
            findings += found
            if digest is not None:
                out.images.setdefault(digest, []).append(place)
                if not _faulty(findings):
                    findings += self._same_pair(pair, digest, place)
                if not _faulty(findings):
                    findings += self._lengths(out, pair, place)
        usable = pair is not None and not _faulty(findings)
        out.usable += usable
        out.segments += usable and bool(pair and pair.segments)
        for each in findings:
            if each.level == "fault":
                out.reasons[each.group] += 1
            out.findings.append(self._accepted(each))

    def _accepted(self, found: Finding) -> Finding:
        """A fault as a note where ``data.bad_records: skip`` leaves the row out."""
        left_out = self.skip and found.level == "fault" and found.key not in _NOT_SKIPPED
        if not left_out:
            return found
        return replace(found, level="note", problem=f"{found.problem} (left out)")

    def _same_id(self, place: Place) -> list[Finding]:
        first = self._first_id.setdefault(place.record or "", place)
        if first is place:
            return []
        problem = f"{place.record} is that of {_named(first, place)} too"
        mend = "Give each pair an id of its own"
        return [_fault(place, "id", problem, mend, kind="id: that of another row")]

    def _same_pair(self, pair: Preference, digest: str, place: Place) -> list[Finding]:
        other = pair.rejected_image.sha256() if pair.rejected_image is not None else ""
        digest = f"{digest} {other}"
        same = _digest(digest, pair.prompt, pair.chosen, pair.rejected)
        first = self._first_pair.setdefault(same, place)
        if first is not place:
            problem = f"the same image, prompt and answers as {_named(first, place)}"
            return [_fault(place, "pair", problem, "Remove one", kind="pair: given twice")]
        turned = self._first_pair.get(_digest(digest, pair.prompt, pair.rejected, pair.chosen))
        if turned is None:
            return []
        problem = f"prefers what {_named(turned, place)} rejects, and the other way round"
        return [
            note(
                place.file,
                "pair",
                problem,
                "Remove one",
                row=place.row,
                record=place.record,
                kind="pair: the opposite of another",
            )
        ]

    def _image(self, pair: Preference, place: Place) -> tuple[str | None, list[Finding]]:
        """(SHA-256 of the bytes, faults); each image is decoded once."""
        path = pair.image.path if pair.image.data is None else None
        known = self._paths.get(path) if path is not None else None
        if known is not None and pair.rejected_image is None and not self.second_image:
            return known, []
        try:
            held = ImageRef(path=pair.image.path, data=pair.image.read())
        except OSError:
            held = pair.image
        pair = replace(pair, image=held)
        skips = [image_fault(pair, self.second_image)]
        if (pair.rejected_image is not None) != self.second_image:
            # Whatever becomes of a second image, the first is looked at.
            skips.append(image_fault(replace(pair, rejected_image=None), False))
        found = [_skipped(place, skip.reason, skip.detail) for skip in skips if skip is not None]
        if found:
            return None, found
        digest = held.sha256()
        if path is not None:
            self._paths[path] = digest
        return digest, []

    def _lengths(self, out: PairsRead, pair: Preference, place: Place) -> list[Finding]:
        """Tokens of the pair; in words where the model is not here."""
        if self.tokens is None:
            out.chosen.append(len(pair.chosen.split()))
            out.rejected.append(len(pair.rejected.split()))
        else:
            made = self.tokens.look(pair)
            if isinstance(made, Unfit):
                return [_fault(place, made.key, made.problem, made.mend, kind=made.kind)]
            out.prefix.append(len(made.prefix))
            out.chosen.append(len(made.chosen))
            out.rejected.append(len(made.rejected))
            out.cut += self.tokens.is_cut(pair, made)
            out.sample = out.sample or made
        out.edits.append(edit_runs(pair.chosen, pair.rejected))
        return []

    def _whole(self, out: PairsRead) -> None:
        """What is wrong with the pairs together."""
        where, train = str(out.path), self.train
        if out.usable < train.batch_size:
            problem = f"{out.usable} usable pairs, fewer than a step's {train.batch_size}"
            mend = "Lower train.batch_size, or give more pairs"
            out.findings.append(fault(where, "train.batch_size", problem, mend))
        if self.edits and out.usable and not out.segments:
            problem = f"{train.preferring().name} weighs segments, but no pair has any"
            mend = "Build the pairs with segments, or name another objective"
            out.findings.append(fault(where, "train.objective", problem, mend))
        if out.cut:
            problem = f"cuts a completion of {out.cut} pairs; they lose their end"
            out.findings.append(note(where, "train.max_length", problem, "Raise it, if unmeant"))


_NOT_SKIPPED = ("tokens", "pair", "line", "row", "file", "record")
"""Keys of faults at which training stops, or which it does not see, whatever the recipe says."""


def edit_runs(chosen: str, rejected: str) -> int:
    """Runs of words in which two texts differ."""
    match = SequenceMatcher(None, chosen.split(), rejected.split(), autojunk=False)
    return sum(tag != "equal" for tag, *_ in match.get_opcodes())


def _skipped(place: Place, reason: str, detail: str) -> Finding:
    if ": " in reason:
        return row_fault(place.file, place.row, place.record, reason, detail)
    problem, _, mend = detail.partition(": ")[2].rpartition(". ")
    return _fault(place, "rejected_image", problem, mend, kind=reason)


def _fault(place: Place, key: str, problem: str, mend: str = "", **more: Any) -> Finding:
    return fault(place.file, key, problem, mend, row=place.row, record=place.record, **more)


def _faulty(findings: list[Finding]) -> bool:
    return any(each.level == "fault" for each in findings)


def _named(first: Place, place: Place) -> str:
    name = f" ({first.record})" if first.record and first.record != place.record else ""
    return f"row {first.row}{name}" + (f" of {first.file}" if first.file != place.file else "")


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()[:16]
