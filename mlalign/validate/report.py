"""The data report of one arm: what a person wants to know of the pairs before they are trained on.

Lengths are in tokens as trained, cut to ``train.max_length``, end of turn included; in words where
the model is not on this machine.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from mlalign.validate.pairs import PairsRead


def report_of(read: PairsRead) -> dict[str, Any]:
    """Numbers by name; what there is no number for is None."""
    sides = list(zip(read.chosen, read.rejected, strict=True))
    shared = [len(places) for places in read.images.values() if len(places) > 1]
    return {
        "file": str(read.path),
        "rows": read.rows,
        "usable": read.usable,
        "unit": read.unit,
        "prefix": _spread(read.prefix),
        "chosen": _spread(read.chosen),
        "rejected": _spread(read.rejected),
        "longer_chosen": _share(sum(c > r for c, r in sides), len(sides)),
        "longer_rejected": _share(sum(c < r for c, r in sides), len(sides)),
        "edits": _spread(read.edits),
        "with_segments": read.segments,
        "cut_by_max_length": read.cut,
        "images": len(read.images),
        "images_shared": len(shared),
        "most_pairs_of_an_image": max((len(p) for p in read.images.values()), default=0),
        "faulty_by_reason": dict(read.reasons.most_common()),
        "skipped_by_build": _build_skips(read),
    }


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "mean": round(statistics.fmean(values), 1),
        "median": statistics.median(values),
        "max": max(values),
    }


def _share(count: int, total: int) -> float | None:
    return round(count / total, 4) if total else None


def _build_skips(read: PairsRead) -> dict[str, int]:
    """What the build left out, by reason, from the manifest beside the pairs."""
    file = read.path / "manifest.json"
    if not file.is_file():
        return {}
    skipped = json.loads(file.read_text(encoding="utf-8")).get("skipped", {})
    return {reason: entry["count"] for reason, entry in skipped.items()}
