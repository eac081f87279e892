"""Read ready pairs for training: every fault is listed, or counted; none is passed over."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mlalign.images import open_image
from mlalign.records import Preference, RecordError, Skip
from mlalign.store import read_preferences

SHOWN = 20
"""Faults listed in full; the rest are counted."""


class DataError(ValueError):
    """Pairs that cannot be trained on. The message lists the faulty records and the mend."""


def load_pairs(
    path: str | Path, *, bad_records: str = "refuse", second_image: bool = False
) -> tuple[list[Preference], Counter]:
    """The pairs of a file or folder, images decoded once to find what is broken.

    Returns the pairs and the number of skipped rows by reason. ``bad_records``: "refuse" raises
    DataError with every fault; "skip" counts them. Raises DataError where no pair is left, and
    StoreError where the file cannot be read. ``second_image``: the objective compares with
    ``rejected_image``, which every pair then needs; else a pair that has one is a fault.
    """
    pairs: list[Preference] = []
    faults: list[Skip] = []
    for record in read_preferences(path):
        skip = record if isinstance(record, Skip) else image_fault(record, second_image)
        if skip is None:
            assert isinstance(record, Preference)
            pairs.append(record)
        else:
            faults.append(skip)
    faults += _duplicates(pairs)
    if faults and bad_records == "refuse":
        raise DataError(_listing(path, faults))
    if not pairs:
        raise DataError(
            f"{path}: no pair to train on" + (f"\n{_listing(path, faults)}" if faults else "")
        )
    return pairs, Counter(fault.reason for fault in faults)


def _duplicates(pairs: list[Preference]) -> list[Skip]:
    """Takes later records of an id that is there already out of ``pairs``: logs, caches and probes
    know a record by its id."""
    seen: set[str] = set()
    kept, faults = [], []
    for pair in pairs:
        if pair.id in seen:
            detail = (
                f"record {pair.id!r}: a record before it has this id. Give each pair an id of its "
                "own"
            )
            faults.append(Skip(id=pair.id, reason="id of another record", detail=detail))
        else:
            seen.add(pair.id)
            kept.append(pair)
    pairs[:] = kept
    return faults


def image_fault(pair: Preference, second_image: bool) -> Skip | None:
    """What is wrong with a pair's image, decoded whole; ``second_image`` as for ``load_pairs``."""
    if (pair.rejected_image is not None) != second_image:
        has = pair.rejected_image is not None
        detail = (
            f"record {pair.id!r}: has rejected_image, but this objective compares no two images. "
            "Remove the column, or train with {name: mdpo, image: record}"
            if has
            else f"record {pair.id!r}: has no rejected_image, with which this objective compares. "
            "Give one to every pair, or train with {name: mdpo, image: crop}"
        )
        reason = "rejected_image is not served" if has else "rejected_image missing"
        return Skip(id=pair.id, reason=reason, detail=detail)
    try:
        open_image(pair.image, pair.id)
        if pair.rejected_image is not None:
            open_image(pair.rejected_image, pair.id)
    except RecordError as error:
        return Skip(id=pair.id, reason=error.reason, detail=str(error))
    return None


def _listing(path: str | Path, faults: list[Skip]) -> str:
    lines = [f"{path}: {len(faults)} faulty record(s):"]
    lines += [f"  {fault.detail or fault.reason}" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  and {len(faults) - SHOWN} more")
    lines.append("Mend or remove them, or set data.bad_records: skip to leave them out, counted")
    return "\n".join(lines)
