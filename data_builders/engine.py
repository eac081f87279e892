"""Runs a builder over examples: streams, counts every skip, writes whole or not at all."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_builders import Builder
from data_builders._pairs import CHOSEN_MENTIONS, REJECTED_MENTIONS, equal_counts
from mlalign.records import Example, Preference, Skip
from mlalign.store import write_preferences

_SAMPLE = 3
"""Record ids named for each reason of a skip."""


class BuildError(ValueError):
    """A build that gave no usable pairs. The message has the counts of every reason."""


@dataclass
class _Tally:
    """What happened, by example and by pair."""

    read: int = 0
    pairs: int = 0
    faulty: set[str] = field(default_factory=set)
    reasons: Counter[str] = field(default_factory=Counter)
    first_ids: dict[str, list[str]] = field(default_factory=dict)
    described: int = 0
    equal: int = 0
    mentions: list[float] = field(default_factory=lambda: [0.0, 0.0])
    words: list[int] = field(default_factory=lambda: [0, 0])
    characters: list[int] = field(default_factory=lambda: [0, 0])

    def skip(self, skip: Skip, expected: frozenset[str]) -> None:
        self.reasons[skip.reason] += 1
        ids = self.first_ids.setdefault(skip.reason, [])
        if len(ids) < _SAMPLE:
            ids.append(skip.id)
        if skip.reason not in expected:
            self.faulty.add(skip.id)

    def pair(self, pair: Preference) -> None:
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

    def faulty_share(self) -> float:
        return len(self.faulty) / self.read if self.read else 0.0

    def lines(self) -> str:
        """Every reason with its count and the first ids, most frequent first."""
        return "\n".join(
            f"  {count} x {reason} (e.g. {', '.join(self.first_ids[reason])})"
            for reason, count in self.reasons.most_common()
        )


def build(
    builder: Builder,
    examples: Iterable[Example | Skip],
    *,
    out_folder: str | Path,
    max_skipped: float,
    desc: str = "",
    about: dict[str, Any] | None = None,
    total: int | None = None,
) -> dict[str, Any]:
    """Write the builder's pairs to ``out_folder`` and return the manifest.

    ``about`` (source, vocabulary, seed...) is added to the manifest. ``max_skipped``: share of the
    records read that may be lost to faults of the data; skips that belong to the method
    (``builder.expected``) are counted beside them. Raises BuildError, leaving ``out_folder`` as it
    was, where no pair was made or too many records were faulty.
    """
    start = time.monotonic()
    name = desc or builder.name
    tally = _Tally()
    manifest: dict[str, Any] = {"builder": builder.name, **_settings(builder), **(about or {})}

    def stream() -> Iterator[Preference]:
        bar = tqdm(
            total=total, desc=name, unit="record", disable=not sys.stderr.isatty(), leave=False
        )
        with contextlib.closing(bar):
            for record in _run(builder, examples, tally, bar):
                if isinstance(record, Skip):
                    tally.skip(record, builder.expected)
                else:
                    tally.pair(record)
                    yield record
        _check(name, tally, max_skipped)
        manifest.update(_numbers(builder, tally, time.monotonic() - start))

    return write_preferences(out_folder, stream(), manifest)


def _run(
    builder: Builder, examples: Iterable[Example | Skip], tally: _Tally, bar: Any
) -> Iterator[Preference | Skip]:
    records = iter(examples)
    while chunk := list(islice(records, builder.chunk)):
        tally.read += len(chunk)
        yield from (record for record in chunk if isinstance(record, Skip))
        yield from builder.build_many([r for r in chunk if not isinstance(r, Skip)])
        bar.update(len(chunk))
        bar.set_postfix(pairs=tally.pairs, skips=sum(tally.reasons.values()))
    yield from builder.finish()


def _check(name: str, tally: _Tally, max_skipped: float) -> None:
    if tally.pairs == 0:
        why = tally.lines() or "  the source gave no record: check its folder and split"
        raise BuildError(
            f"builder {name} made no pair at all from {tally.read} records. Nothing was written; "
            f"what happened to them:\n{why}"
        )
    if tally.faulty_share() > max_skipped:
        raise BuildError(
            f"builder {name} lost {len(tally.faulty)} of {tally.read} records "
            f"({tally.faulty_share():.1%}) to faults, more than data.max_skipped = {max_skipped:g} "
            f"allows. Nothing was written. Mend the records or raise data.max_skipped:\n"
            + tally.lines()
        )


def _settings(builder: Builder) -> dict[str, Any]:
    settings = getattr(builder, "settings", None)
    return {"settings": settings.model_dump(mode="json")} if settings is not None else {}


def _numbers(builder: Builder, tally: _Tally, seconds: float) -> dict[str, Any]:
    pairs, described = tally.pairs, tally.described
    return {
        "records": tally.read,
        "skipped": {
            reason: {
                "count": count,
                "expected": reason in builder.expected,
                "first_ids": tally.first_ids[reason],
            }
            for reason, count in tally.reasons.most_common()
        },
        "faulty_share": round(tally.faulty_share(), 4),
        "description_pairs": described,
        "equal_mention_share": round(tally.equal / described, 4) if described else None,
        "mean_mentions_chosen": round(tally.mentions[0] / described, 3) if described else None,
        "mean_mentions_rejected": round(tally.mentions[1] / described, 3) if described else None,
        "mean_words_chosen": round(tally.words[0] / pairs, 2),
        "mean_words_rejected": round(tally.words[1] / pairs, 2),
        "mean_characters_chosen": round(tally.characters[0] / pairs, 2),
        "mean_characters_rejected": round(tally.characters[1] / pairs, 2),
        "seconds": round(seconds, 2),
        **builder.report(),
    }
