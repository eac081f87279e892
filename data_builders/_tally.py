"""What a build counts: records and skips per chunk, which add up; the sides of the pairs kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_builders._pairs import CHOSEN_MENTIONS, REJECTED_MENTIONS, equal_counts
from mlalign.records import Preference, Skip

SAMPLE = 3
"""Record ids named for each reason of a skip."""


@dataclass(kw_only=True)
class Tally:
    """Numbers of one chunk, or of several added up in order."""

    read: int = 0
    """Records that the source gave, faulty ones too."""
    candidates: int = 0
    """Pairs made, before ``finish`` leaves some out."""
    faulty: int = 0
    """Records lost for a reason that is not the method's own."""
    reasons: Counter[str] = field(default_factory=Counter)
    first_ids: dict[str, list[str]] = field(default_factory=dict)
    """The first ids of each reason."""
    seen: Counter[str] = field(default_factory=Counter)
    """The builder's own counts."""
    seconds: float = 0.0
    """Time spent, an interrupted chunk's left out."""

    def skips(self, skips: Iterable[Skip], expected: frozenset[str]) -> None:
        """Skips that belong together: a record that gave several is one faulty record."""
        faulty = set()
        for skip in skips:
            self._count(skip.reason, 1, [skip.id])
            if skip.reason not in expected:
                faulty.add(skip.id)
        self.faulty += len(faulty)

    def add(self, other: Tally) -> None:
        """Another chunk's numbers."""
        self.read += other.read
        self.candidates += other.candidates
        self.faulty += other.faulty
        for reason, count in other.reasons.items():
            self._count(reason, count, other.first_ids[reason])
        self.seen.update(other.seen)
        self.seconds += other.seconds

    def _count(self, reason: str, count: int, ids: list[str]) -> None:
        self.reasons[reason] += count
        first = self.first_ids.setdefault(reason, [])
        first.extend(ids[: SAMPLE - len(first)])

    def skipped(self) -> int:
        """Skips of every reason."""
        return sum(self.reasons.values())

    def faulty_share(self) -> float:
        """Of the records read."""
        return self.faulty / self.read if self.read else 0.0

    def lines(self) -> str:
        """Every reason with its count and the first ids, most frequent first."""
        return "\n".join(
            f"  {count} x {reason} (e.g. {', '.join(self.first_ids[reason])})"
            for reason, count in self.reasons.most_common()
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "reasons": dict(self.reasons), "seen": dict(self.seen)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tally:
        """What ``to_json`` made."""
        counters = {key: Counter(value[key]) for key in ("reasons", "seen")}
        return cls(**{**value, **counters})


@dataclass
class Sides:
    """How the two answers of the kept pairs compare."""

    pairs: int = 0
    described: int = 0
    equal: int = 0
    mentions: list[float] = field(default_factory=lambda: [0.0, 0.0])
    words: list[int] = field(default_factory=lambda: [0, 0])
    characters: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, pair: Preference) -> None:
        """One pair."""
        self.pairs += 1
        equal = equal_counts(pair)
        if equal is not None:
            self.described += 1
            self.equal += equal
            self.mentions[0] += pair.scores[CHOSEN_MENTIONS]
            self.mentions[1] += pair.scores[REJECTED_MENTIONS]
        for side, text in enumerate((pair.chosen, pair.rejected)):
            self.words[side] += len(text.split())
            self.characters[side] += len(text)

    def numbers(self) -> dict[str, Any]:
        """For the manifest; None where no pair is a description."""
        pairs, described = self.pairs, self.described
        return {
            "description_pairs": described,
            "equal_mention_share": round(self.equal / described, 4) if described else None,
            "mean_mentions_chosen": round(self.mentions[0] / described, 3) if described else None,
            "mean_mentions_rejected": round(self.mentions[1] / described, 3) if described else None,
            "mean_words_chosen": round(self.words[0] / pairs, 2),
            "mean_words_rejected": round(self.words[1] / pairs, 2),
            "mean_characters_chosen": round(self.characters[0] / pairs, 2),
            "mean_characters_rejected": round(self.characters[1] / pairs, 2),
        }
