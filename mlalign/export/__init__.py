"""Pairs as other frameworks take them: one file per framework. No torch.

An exporter is a class with a ``Settings`` attribute, built as ``METHOD(settings)``:

    lacks: frozenset[str]                      what of a pair its format has no place for
    write(pairs, folder, final) -> None        the whole export into ``folder``, later ``final``

``export`` runs one: it reads, checks and counts, and leaves a whole folder or none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from mlalign.images import open_image
from mlalign.records import Preference, RecordError, Skip
from mlalign.store import folder_atomic, read_preferences

SHOWN = 20
"""Faults listed in full; the rest are counted."""


class ExportError(ValueError):
    """Pairs that were not exported. The message lists the faulty records and the mend."""


class Exporter(Protocol):
    """What ``export`` asks of an exporter."""

    lacks: frozenset[str]

    def write(self, pairs: Iterable[Preference], folder: Path, final: Path) -> None:
        """Write every pair into ``folder``, which is renamed ``final`` when all are there."""
        ...


def export(
    exporter: Exporter, source: str | Path, out: str | Path, *, skip_bad: bool = False
) -> dict[str, Any]:
    """Write the pairs of a file or folder to the new folder ``out``, and say what was written.

    Returns ``pairs``, ``skipped`` (rows by reason) and ``left_out`` (pairs by what of them the
    format has no place for). Raises ExportError where a row is faulty and ``skip_bad`` is not set,
    where no pair is left, or where ``out`` is there already; then nothing is written.
    """
    target = Path(out).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} is there already; give a new folder")
    pairs = 0
    faults: list[Skip] = []
    left_out: Counter[str] = Counter()

    def usable() -> Iterator[Preference]:
        nonlocal pairs
        for record in read_preferences(source):
            skip = record if isinstance(record, Skip) else _fault(record)
            if skip is not None:
                faults.append(skip)
                continue
            assert isinstance(record, Preference)
            left_out.update(part for part in sorted(exporter.lacks) if getattr(record, part))
            pairs += 1
            yield record
        if faults and not skip_bad:
            raise ExportError(_listing(source, faults))
        if not pairs:
            raise ExportError(f"{source}: no pair to export. Build or mend it first")

    with folder_atomic(target) as aside:
        exporter.write(usable(), aside, target)
    skipped = Counter(fault.reason for fault in faults)
    return {"pairs": pairs, "skipped": dict(skipped), "left_out": dict(left_out)}


def _fault(pair: Preference) -> Skip | None:
    """What a framework would stumble over later: an image that cannot be read."""
    try:
        for image in filter(None, (pair.image, pair.rejected_image)):
            open_image(image, pair.id)
    except RecordError as error:
        return Skip(id=pair.id, reason=error.reason, detail=str(error))
    return None


def _listing(source: str | Path, faults: list[Skip]) -> str:
    lines = [f"{source}: {len(faults)} faulty record(s), nothing was written:"]
    lines += [f"  {fault.detail or fault.reason}" for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  and {len(faults) - SHOWN} more")
    return "\n".join([*lines, "Mend or remove them, or leave them out, counted, by --skip-bad"])
