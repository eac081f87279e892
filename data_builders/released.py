"""Turns a released preference set into the pairs of one arm: counted, whole or not at all.

The source does the reading (``data_builders.sources``); no builder and no model is asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from data_builders._chunks import BuildError
from data_builders._tally import Sides, Tally
from mlalign.records import Preference, Skip
from mlalign.store import write_preferences


class Source(Protocol):
    """What ``build`` asks of a source of pairs."""

    name: str
    expected: frozenset[str]

    def pairs(self, limit: int | None, seed: int) -> Iterator[Preference | Skip]:
        """Pairs and skips of the first ``limit`` rows."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What was read."""
        ...


def build(
    source: Source,
    *,
    out_folder: str | Path,
    max_skipped: float,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the source's pairs to ``out_folder`` and return the manifest.

    ``limit``: rows of the release that are read, from its beginning. ``records`` in the manifest
    are the pairs and the skips that its rows gave; ``max_skipped`` is the share of these that may
    be lost to faults, beside skips that the release or a setting brings (``source.expected``).
    Raises BuildError, leaving ``out_folder`` as it was, where there is no pair, where too much was
    lost, or where the source cannot be read.
    """
    start = time.monotonic()
    tally, sides = Tally(), Sides()
    manifest: dict[str, Any] = {"source": source.fingerprint(), "seed": seed, "examples": limit}

    def kept() -> Iterator[Preference]:
        for record in source.pairs(limit, seed):
            tally.read += 1
            if isinstance(record, Skip):
                tally.skips([record], source.expected)
            else:
                sides.add(record)
                yield record
        _check(source.name, tally, sides.pairs, max_skipped)
        manifest.update(_numbers(tally, sides, source.expected, time.monotonic() - start))

    return write_preferences(out_folder, kept(), manifest)


def _check(name: str, tally: Tally, pairs: int, max_skipped: float) -> None:
    if pairs == 0:
        why = tally.lines() or "  the files hold no row"
        raise BuildError(f"source {name} gave no pair at all; nothing was written:\n{why}")
    if tally.faulty_share() > max_skipped:
        raise BuildError(
            f"source {name} lost {tally.faulty} of {tally.read} records "
            f"({tally.faulty_share():.1%}) to faults, more than data.max_skipped = {max_skipped:g} "
            f"allows; nothing was written. Mend the rows, or raise data.max_skipped:\n"
            + tally.lines()
        )


def _numbers(
    tally: Tally, sides: Sides, expected: frozenset[str], seconds: float
) -> dict[str, Any]:
    return {
        "records": tally.read,
        "skipped": {
            reason: {
                "count": count,
                "expected": reason in expected,
                "first_ids": tally.first_ids[reason],
            }
            for reason, count in tally.reasons.most_common()
        },
        "faulty_share": round(tally.faulty_share(), 4),
        **sides.numbers(),
        "seconds": round(seconds, 2),
        "records_per_second": round(tally.read / seconds, 2) if seconds else None,
    }
