"""Runs a builder over examples: streams, counts every skip, resumes, writes whole or not at all.

Two phases. Examples are read in chunks of ``builder.chunk``; what the builder makes of a chunk is
committed to ``<out_folder>.partial`` when it is done. Then the builder's ``finish`` goes through
the committed pairs in order, and what it keeps is written to ``out_folder``. Killed at any moment,
the next start redoes the chunk that was under way, or the second phase, and gives the same bytes.
One chunk is held in memory at a time.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_builders import Builder
from data_builders._chunks import BuildError as BuildError
from data_builders._chunks import Journal
from data_builders._identity import identity, settings_of
from data_builders._tally import Sides, Tally
from mlalign.records import Example, Preference, Skip
from mlalign.store import write_preferences

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

Examples = Iterable[Example | Skip] | Callable[[int], Iterable[Example | Skip]]
"""Records, or a function that gives them from the n-th on without reading those before it."""


class NoPairsError(BuildError):
    """A build of which nothing is worth keeping."""


def partial_of(out_folder: str | Path) -> Path:
    """Where the finished chunks of a build lie until it is done."""
    out = Path(out_folder)
    return out.with_name(out.name + ".partial")


def build(
    builder: Builder,
    examples: Examples,
    *,
    out_folder: str | Path,
    max_skipped: float,
    desc: str = "",
    about: dict[str, Any] | None = None,
    total: int | None = None,
    asked: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Write the builder's pairs to ``out_folder`` and return the manifest.

    ``about`` names what decides the pairs beside the builder's settings (source, seed, model,
    judge...); it stands in the manifest, and a build that was stopped is only taken up again with
    the same. ``max_skipped``: share of the records read that may be lost to faults of the data;
    skips that belong to the method (``builder.expected``) are counted beside them. ``asked`` gives
    what the models asked have cost, for the manifest, when the pairs are written; a build that was
    taken up again has there what this last part of it asked.

    Raises BuildError, leaving ``out_folder`` as it was, where no pair was made, too many records
    were faulty, the disk is full, or ``<out_folder>.partial`` belongs to another build. Whatever
    stops a build, finished chunks are kept, but for one that made no pair at all.
    """
    out, name = Path(out_folder), desc or builder.name
    manifest: dict[str, Any] = {
        "builder": builder.name,
        **({"settings": settings_of(builder)} if settings_of(builder) else {}),
        **(about or {}),
    }
    with _full_disk(name, out):
        journal = Journal(partial_of(out), identity(builder, about or {}))
        try:
            unsaved = _make(builder, examples, journal, name, total)
            pairs = _kept(builder, journal, name, max_skipped, unsaved, manifest)
            write_preferences(out, _then(pairs, lambda: manifest.update(asked())), manifest)
            journal.remove()
        except BaseException as error:
            if isinstance(error, NoPairsError) or not len(journal):
                journal.remove()
            else:
                journal.close()
                _say(f"{name}: stopped; {_done(journal)} are kept in {journal.folder}")
            raise
    return manifest


def sweep(out_folder: str | Path) -> None:
    """Remove what a kill in the last moment of a finished build may have left beside it."""
    shutil.rmtree(partial_of(out_folder), ignore_errors=True)


def _make(
    builder: Builder, examples: Examples, journal: Journal, name: str, total: int | None
) -> float:
    """Commit every chunk that is not there yet; returns when the last of them was counted, as
    ``time.monotonic()``: what comes after is not in the journal's seconds."""
    mark = time.monotonic()
    if len(journal):
        _say(f"{name}: going on; {_done(journal)} are in {journal.folder}")
    records = _from(examples, len(journal) * builder.chunk)
    with _bar(total, name, "record", journal.tally.read) as bar:
        while chunk := list(islice(records, builder.chunk)):
            tally, pairs = _chunk(builder, chunk)
            now = time.monotonic()
            tally.seconds, mark = now - mark, now
            journal.commit(tally, pairs)
            bar.update(len(chunk))
            bar.set_postfix(pairs=journal.tally.candidates, skips=journal.tally.skipped())
    return mark


def _chunk(builder: Builder, records: list[Example | Skip]) -> tuple[Tally, list[Preference]]:
    builder.seen.clear()
    skips = [record for record in records if isinstance(record, Skip)]
    pairs: list[Preference] = []
    for made in builder.build_many([r for r in records if not isinstance(r, Skip)]):
        if isinstance(made, Skip):
            skips.append(made)
        else:
            pairs.append(made)
    tally = Tally(read=len(records), candidates=len(pairs))
    tally.skips(skips, builder.expected)
    tally.seen.update(builder.seen)
    return tally, pairs


def _kept(
    builder: Builder,
    journal: Journal,
    name: str,
    max_skipped: float,
    unsaved: float,
    manifest: dict[str, Any],
) -> Iterator[Preference]:
    """The pairs that ``finish`` leaves; after the last of them the manifest is complete."""
    tally, sides, given = Tally(), Sides(), 0
    tally.add(journal.tally)
    with _bar(tally.candidates, f"{name}: writing", "pair") as bar:
        for record in builder.finish(journal):
            given += 1
            bar.update()
            if isinstance(record, Skip):
                tally.skips([record], builder.expected)
            else:
                sides.add(record)
                yield record
    if given != tally.candidates:
        raise BuildError(
            f"builder {name}: finish gave {given} of {tally.candidates} pairs back. Each is to be "
            "given back, or a Skip in its place"
        )
    _check(name, tally, sides.pairs, max_skipped, journal.folder)
    seconds = tally.seconds + time.monotonic() - unsaved
    manifest |= {
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
        **sides.numbers(),
        "seconds": round(seconds, 3),
        "records_per_second": round(tally.read / seconds, 2),
        **builder.report(tally.seen),
    }


def _then(pairs: Iterator[Preference], last: Callable[[], None]) -> Iterator[Preference]:
    """``pairs``, and ``last`` after the last of them."""
    yield from pairs
    last()


def _check(name: str, tally: Tally, pairs: int, max_skipped: float, folder: Path) -> None:
    if pairs == 0:
        why = tally.lines() or "  the source gave no record: check its folder and split"
        raise NoPairsError(
            f"builder {name} made no pair at all from {tally.read} records. Nothing was written; "
            f"what happened to them:\n{why}"
        )
    if tally.faulty_share() > max_skipped:
        raise BuildError(
            f"builder {name} lost {tally.faulty} of {tally.read} records "
            f"({tally.faulty_share():.1%}) to faults, more than data.max_skipped = {max_skipped:g} "
            f"allows. No pairs were written. Raise data.max_skipped and build again, which uses "
            f"what is done; or mend the records and remove {folder}:\n" + tally.lines()
        )


def _from(examples: Examples, start: int) -> Iterator[Example | Skip]:
    return iter(examples(start)) if callable(examples) else islice(examples, start, None)


@contextlib.contextmanager
def _bar(total: int | None, name: str, unit: str, done: int = 0) -> Iterator[Any]:
    """A bar with the rate; what an earlier start has done does not count for the rate."""
    quiet = not sys.stderr.isatty()
    with tqdm(total=total, initial=done, desc=name, unit=unit, disable=quiet, leave=False) as bar:
        yield bar


@contextlib.contextmanager
def _full_disk(name: str, out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise BuildError(
            f"builder {name}: the disk is full ({error}). {out} is as it was; finished chunks are "
            f"kept in {partial_of(out)}. Free some space and build again to go on"
        ) from error


def _done(journal: Journal) -> str:
    return f"{journal.tally.read} records ({journal.tally.candidates} pairs)"


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
