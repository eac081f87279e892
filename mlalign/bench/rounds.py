"""Rounds of alternating sides, and the row that comes of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.progress import track

LOGPS = 1e-4
"""Largest difference of loss or per-token log-prob (float32) at which two sides did the same."""
GRADS = 1e-3
"""Largest difference of LoRA gradients, relative to their norm. The loss of an on-policy GRPO step
is its advantages alone, whatever the log-probs: there the gradient is what says it."""
LEAST_MARGIN = 0.01
"""A smaller margin says that the adapter does nothing: then any two layouts agree."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One work against one opponent."""

    work: str
    opponent: str
    ratio_median: float
    """Opponent's seconds over ours, by round."""
    ratio_min: float
    ratio_max: float
    ours_seconds: float
    """Median."""
    opponent_seconds: float
    ceiling: float | None = None
    """Closed-form FLOPs of padded rows over ours, where these are the opponent."""
    loss_max_abs_diff: float | None = None
    logps_max_abs_diff: float | None = None
    grad_rel_diff: float | None = None
    peak_memory_ratio: float | None = None
    """Ours over the opponent's: peak resident less resident after loading."""
    margin: float | None = None
    """Mean size of the margins (log-ratios of chosen less rejected), without beta; of a group, of
    the log-ratios themselves."""

    @property
    def invalid(self) -> str:
        """Why the row says nothing; "" where it does."""
        for name, most in (
            ("loss_max_abs_diff", LOGPS),
            ("logps_max_abs_diff", LOGPS),
            ("grad_rel_diff", GRADS),
        ):
            value = getattr(self, name)
            if value is not None and not value <= most:
                return f"{name} {value:.1e} above {most:.0e}"
        if self.margin is not None and self.margin < LEAST_MARGIN:
            return f"margin {self.margin:.3f} under {LEAST_MARGIN}"
        return ""

    def to_json(self) -> dict[str, Any]:
        """The row with its validity."""
        return {**asdict(self), "invalid": self.invalid}


def alternate(
    sides: Mapping[str, Callable[[], Any]], rounds: int, what: str
) -> dict[str, list[float]]:
    """Seconds of every side in every round, after one round that is not counted.

    The order of the sides rotates from round to round, so that none always runs after the same.
    """
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in track(range(rounds + 1), description=f"{what}: rounds"):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            sides[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row_of(work: str, opponent: str, ours: list[float], theirs: list[float], **facts: Any) -> Row:
    """The row of two sides' seconds; ratios are taken within rounds."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return Row(
        work=work,
        opponent=opponent,
        ratio_median=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        ours_seconds=statistics.median(ours),
        opponent_seconds=statistics.median(theirs),
        **facts,
    )
