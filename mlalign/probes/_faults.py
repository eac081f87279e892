"""What a pass says of readings that cannot be what they are called: a note, and NaN."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mlalign.branching.batch import ProbeReading
from mlalign.probes._probe import ATTENTION, GRADIENT, SWAPPED, Item, Probe

_NAMED = 3
"""Records that a note names; the others are counted."""


class SidedFault(NamedTuple):
    """A record whose activations are not finite on a side ("base", "adapted")."""

    side: str
    view: str
    record: str
    layer: int
    """The first block whose output is not finite; -1: what comes after the last one."""


def what_the_set_has(items: Sequence[Item]) -> dict[str, bool]:
    """Of these items: boxes, another image, words for real and for absent objects; several
    records."""
    words = [word for item in items for each in item.mentions for word in each]
    return {
        "another image": any(item.swapped is not None for item in items),
        "boxes": any(item.boxes for item in items),
        "real": any(word.real for word in words),
        "absent": any(not word.real for word in words),
        "several": len({item.record.id for item in items}) > 1,
    }


def of_set(ranks: Sequence[dict[str, bool]], needs: Collection[str]) -> list[str]:
    """What the whole set lacks of what is needed, and what that does."""
    has = {key: any(rank[key] for rank in ranks) for key in ranks[0]}
    several = has["several"] or len(ranks) > 1
    wants_words = bool({ATTENTION} & set(needs))
    lacks = {
        "one record: intervals and correlations over records are empty": several,
        "one image: there is no other one to swap in, and readings of the view swapped are NaN or "
        "left out": has["another image"] or SWAPPED not in needs,
        "no box that an image token touches: readings inside boxes are NaN or left out": has[
            "boxes"
        ]
        or not wants_words,
        "no word for a real object: readings at such words are NaN or left out": has["real"],
        "no word for an absent object: readings at such words are NaN or left out": has["absent"],
    }
    return [f"the probe set has {what}" for what, fine in lacks.items() if not fine]


def concerning(probe: Probe, ranks: Sequence[dict[str, Any]]) -> list[SidedFault]:
    """What is not finite and enters the probe; of each rank its "faults", and under "reads" the
    probes that read log-probs."""
    reads = probe.needs or any(probe.name in rank["reads"] for rank in ranks)
    return [
        fault
        for rank in ranks
        for fault in rank["faults"]
        if (reads if fault.view == "image" else fault.view in probe.needs)
    ]


def said(probe: Probe, faults: Sequence[SidedFault], end: str = "") -> list[str]:
    """One note for each side and view, with the first records and blocks by name."""
    places = dict.fromkeys((fault.side, fault.view) for fault in faults)
    end = end or "readings that they enter are NaN"
    notes = []
    for side, view in places:
        here = [fault for fault in faults if (fault.side, fault.view) == (side, view)]
        named = ", ".join(f"{f.record} ({_where(f)})" for f in here[:_NAMED])
        more = f" and {len(here) - _NAMED} more" if len(here) > _NAMED else ""
        notes.append(
            f"probe {probe.name}: activations are not finite on side {side}, view {view}: record "
            f"{named}{more}; {end}"
        )
    return notes


def _where(fault: SidedFault) -> str:
    if fault.view == GRADIENT:
        return "the gradient"
    return f"from layer {fault.layer} on" if fault.layer >= 0 else "the log-probs"


def blanked(
    readings: Sequence[ProbeReading], probe: Probe, faults: Sequence[SidedFault]
) -> list[ProbeReading]:
    """The readings, NaN where something that is not finite enters: never a number by accident.

    A comparison with NaN is False, so a count over it would look like one. Readings of blocks
    before the first such one stay, and so do the probe's ``inert`` metrics.
    """
    if not faults:
        return list(readings)
    nan = math.nan
    return [
        replace(reading, value=nan, noise=nan, lo=nan, hi=nan)
        if reading.metric not in probe.inert and any(_enters(f, reading) for f in faults)
        else reading
        for reading in readings
    ]


def _enters(fault: SidedFault, reading: ProbeReading) -> bool:
    side = reading.side in (fault.side, "delta")
    record = reading.record in ("", fault.record)
    # The log-probs come after all layers.
    layer = reading.layer < 0 or 0 <= fault.layer <= reading.layer
    return side and record and layer
