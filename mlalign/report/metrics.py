"""What the summary's numbers are called, in which unit they are shown, and which way is better."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

Better = Literal["lower", "higher", "none"]
Side = dict[str, Any]
"""One side of one arm in summary.json: flat, ``key``, ``key_ci95``, ``key_n``."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the summary."""

    key: str
    """Key in summary.json."""
    label: str
    """At most 15 characters: the terminal table has 100 columns."""
    unit: str = "%"
    """"%" shows 100 times the stored rate."""
    better: Better = "none"
    """"none": neither way is better by itself, so a change is never coloured."""
    digits: int = 1
    help: str = ""

    @property
    def scale(self) -> float:
        """Factor from the stored number to the shown one."""
        return 100.0 if self.unit == "%" else 1.0


METRICS: tuple[Metric, ...] = (
    Metric(
        key="halluc/chair_i",
        label="CHAIR_i",
        better="lower",
        help="share of the mentioned objects that are not in the image",
    ),
    Metric(
        key="halluc/chair_s",
        label="CHAIR_s",
        better="lower",
        help="share of the answers with at least one object that is not in the image",
    ),
    Metric(
        key="halluc/recall",
        label="recall",
        better="higher",
        help="share of the objects in the image that the answer mentions",
    ),
    Metric(
        key="halluc/length",
        label="length",
        unit="words",
        help="words per answer; shorter answers hallucinate less by saying less",
    ),
    Metric(
        key="halluc/mentions",
        label="mentions",
        unit="objects",
        digits=2,
        help="objects mentioned per answer",
    ),
    Metric(key="halluc/empty_rate", label="empty answers", better="lower", help="without a word"),
    Metric(
        key="halluc/typical_share",
        label="typical share",
        help="hallucinated mentions that are typical companions of something in the image",
    ),
    Metric(key="pope/accuracy", label="POPE accuracy", better="higher", help="yes/no questions"),
    Metric(key="pope/f1", label="POPE F1", better="higher", help="F1 of the answer yes"),
    Metric(key="pope/precision", label="POPE precis.", better="higher", help="of the answer yes"),
    Metric(key="pope/recall", label="POPE recall", better="higher", help="of the answer yes"),
    Metric(
        key="pope/yes_rate",
        label="POPE yes rate",
        help="share of the answers that say yes; half of the true answers do",
    ),
    Metric(
        key="pope/unparsed_rate",
        label="POPE unparsed",
        better="lower",
        help="share of the answers that are neither yes nor no",
    ),
    Metric(
        key="lm/clean_caption_nll",
        label="clean NLL",
        unit="nats/token",
        better="lower",
        digits=3,
        help="negative log-likelihood of true captions; rises where language breaks",
    ),
)
BY_KEY = {m.key: m for m in METRICS}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A number of the summary, in shown units."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    """How many items it is over."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, where there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def reading(side: Side, metric: Metric) -> Reading | None:
    """The number of ``metric`` on one side, or None where it is not there or not finite."""
    value = side.get(metric.key)
    if not is_number(value):
        return None
    low, high = side.get(f"{metric.key}_ci95") or (None, None)
    n = side.get(f"{metric.key}_n", side.get("n"))
    return Reading(
        value=float(value) * metric.scale,
        low=float(low) * metric.scale if is_number(low) else None,
        high=float(high) * metric.scale if is_number(high) else None,
        n=int(n) if is_number(n) else None,
    )


CHANGE = "change"
"""Side of an arm that holds after minus before, with paired intervals, where the run has it."""


def metrics_of(summary: dict[str, Any], *, known: bool | None = None) -> list[Metric]:
    """The metrics that occur in the summary: those of METRICS first, then every other number.

    ``known``: True gives only the former, False only the latter.
    """
    keys = {
        key: None
        for sides in summary.get("builders", {}).values()
        for side in sides.values()
        if isinstance(side, dict)
        for key, value in side.items()
        if is_number(value) and key != "n" and not key.endswith(("_n", "_ci95"))
    }
    ours = [m for m in METRICS if m.key in keys] if known is not False else []
    return ours + [_unknown(k) for k in keys if k not in BY_KEY and known is not True]


def sides_of(summary: dict[str, Any]) -> dict[str, list[str]]:
    """Arm -> its sides in the order shown: before, after, then controls such as blind."""
    return {
        arm: sorted(
            (name for name, side in sides.items() if isinstance(side, dict) and name != CHANGE),
            key=lambda name: ["before", "after"].index(name) if name in ("before", "after") else 2,
        )
        for arm, sides in summary.get("builders", {}).items()
    }


def shown(value: float, metric: Metric) -> str:
    """The number alone, rounded."""
    return f"{value:.{metric.digits}f}".replace("-", "\u2212")


def shown_interval(reading: Reading, metric: Metric) -> str:
    """``[20.1, 26.9]``, or nothing where there is no interval."""
    if reading.interval is None:
        return ""
    low, high = reading.interval
    return f"[{shown(low, metric)}, {shown(high, metric)}]"


def change(sides: dict[str, Side], metric: Metric, side: str = "after") -> Reading | None:
    """``side`` minus before in shown units: with a paired interval where the run has one."""
    before, after = (reading(sides.get(name) or {}, metric) for name in ("before", side))
    if before is None or after is None:
        return None
    paired = reading(sides.get(CHANGE) or {}, metric) if side == "after" else None
    return paired or Reading(value=after.value - before.value)


def is_clear(sides: dict[str, Side], metric: Metric, side: str = "after") -> bool | None:
    """Is the change more than chance? By its paired interval, else by whether the intervals of
    before and after are apart (stricter). None where there are no intervals."""
    moved = change(sides, metric, side)
    if moved is None:
        return None
    if moved.interval is not None:
        return not moved.interval[0] <= 0 <= moved.interval[1]
    before, after = (reading(sides[name], metric) for name in ("before", side))
    if before is None or after is None or before.interval is None or after.interval is None:
        return None
    return before.interval[1] < after.interval[0] or after.interval[1] < before.interval[0]


def signed(value: float, digits: int = 1) -> str:
    """With its sign and a true minus; zero has no sign."""
    if round(value, digits) == 0:
        return f"{0:.{digits}f}"
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def rounded(value: float, interval: tuple[float, float] | None = None) -> str:
    """``0.30 [0.27, 0.33]``: as many decimals as the interval deserves."""
    width = interval[1] - interval[0] if interval else abs(value) / 5
    digits = min(max(math.ceil(-math.log10(width / 3)), 0), 6) if width > 0 else 3
    text = f"{value:.{digits}f}"
    if interval:
        text += f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return text.replace("-", "\u2212")


def is_number(value: Any) -> TypeGuard[float]:
    """A finite int or float (bool is not a number here)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _unknown(key: str) -> Metric:
    # A part of a known metric (pope/random/accuracy) has its unit; any other number is shown as it
    # is stored. None is left out.
    room, _, name = key.rpartition("/")
    whole = BY_KEY.get(f"{room.partition('/')[0]}/{name}")
    if whole is not None:
        return replace(whole, key=key, label=key, help=whole.help)
    return Metric(key=key, label=key, unit="", digits=3)
