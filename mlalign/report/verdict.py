"""The first sentence of the page, built from the numbers: never a hallucination rate alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlalign.report import metrics as m

RECALL_DROP = 2.0
"""Points of recall; a larger drop is flagged."""
LENGTH_CHANGE = 0.05
"""Relative change of the answer's length; a larger one is flagged."""
NLL_RISE = 0.10
"""Relative rise of the clean-caption loss; a larger one is flagged."""
YES_CHANGE = 10.0
"""Points of POPE yes rate; a larger change is flagged."""
UNPARSED = 5.0
"""Per cent of unparsed answers; more are flagged."""


Sides = dict[str, m.Side]
"""Side name -> its numbers, of one arm."""
_NAMES = {"lm/clean_caption_nll": "clean-caption loss"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happened to one arm."""

    arm: str
    sentence: str
    warnings: tuple[str, ...]
    """What makes a lower hallucination rate worth less than it looks."""
    chair: float | None
    """Change of CHAIR_i in points; None where it was not measured on both sides."""
    clear: bool
    """That change is more than chance."""
    recall: float | None
    """Change of recall in points."""


def verdicts(summary: dict[str, Any]) -> list[Verdict]:
    """One verdict per arm that has a before and an after."""
    return [
        Verdict(
            arm=arm,
            sentence=sentence(sides),
            warnings=tuple(warnings(sides)),
            chair=_change("halluc/chair_i", sides),
            clear=bool(m.is_clear(sides, m.BY_KEY["halluc/chair_i"])),
            recall=_change("halluc/recall", sides),
        )
        for arm, sides in summary.get("builders", {}).items()
        if "before" in sides and "after" in sides
    ]


def headline(found: list[Verdict]) -> str:
    """One sentence over all arms: what the hallucination rate did and what recall did."""
    if not found:
        return "This run has not been evaluated before and after."
    told = [v for v in found if v.chair is not None]
    if not told:
        return "No hallucination measure was taken before and after."
    fell = [v for v in told if v.clear and v.chair is not None and v.chair < 0]
    rose = [v for v in told if v.clear and v.chair is not None and v.chair > 0]
    parts = [f"{v.arm} {_points(v.chair)}" for v in told]
    recalls = [f"{v.arm} {_points(v.recall)}" for v in told if v.recall is not None]
    text = f"CHAIR_i fell clearly in {len(fell)} of {len(told)} arms"
    text += f" and rose clearly in {len(rose)}" if rose else ""
    text += f" (points: {', '.join(parts)}); "
    text += f"recall changed by {', '.join(recalls)} points" if recalls else "recall is unknown"
    flagged = [v.arm for v in found if v.warnings]
    return text + (f". Read the warnings on {', '.join(flagged)}." if flagged else ".")


def sentence(sides: Sides) -> str:
    """CHAIR_i with recall, length and clean loss in one breath."""
    told = ("halluc/chair_i", "halluc/recall", "halluc/length", "lm/clean_caption_nll")
    metrics = [m.BY_KEY[key] for key in told]
    parts = [f"{_NAMES.get(x.key, x.label)} {text}" for x in metrics if (text := _moved(x, sides))]
    return "; ".join(parts) if parts else "no hallucination measure was taken"


def warnings(sides: Sides) -> list[str]:
    """What a reader must know before believing a lower hallucination rate."""
    found = []
    change = _change("halluc/recall", sides)
    if change is not None and change < -RECALL_DROP:
        found.append(f"recall fell by {-change:.1f} points: it says less of what is there")
    for key, word in (("halluc/length", "words"), ("halluc/mentions", "mentions")):
        ratio = _ratio(key, sides)
        if ratio is not None and abs(ratio) > LENGTH_CHANGE:
            way = "more" if ratio > 0 else "fewer"
            found.append(f"{abs(ratio) * 100:.0f} % {way} {word} per answer")
    ratio = _ratio("lm/clean_caption_nll", sides)
    if ratio is not None and ratio > NLL_RISE:
        found.append(f"clean-caption loss up {ratio * 100:.0f} %: language got worse")
    change = _change("pope/yes_rate", sides)
    if change is not None and abs(change) > YES_CHANGE:
        found.append(f"POPE yes rate moved by {m.signed(change, 0)} points: a shift of habit")
    unparsed = m.reading(sides["after"], m.BY_KEY["pope/unparsed_rate"])
    if unparsed is not None and unparsed.value > UNPARSED:
        found.append(f"{unparsed.value:.0f} % of the POPE answers are neither yes nor no")
    return found


def _moved(metric: m.Metric, sides: Sides) -> str:
    before, after = (m.reading(sides[name], metric) for name in ("before", "after"))
    if before is None or after is None:
        return ""
    first, second = m.shown(before.value, metric), m.shown(after.value, metric)
    unit = " %" if metric.unit == "%" else f" {metric.unit}"
    if first == second:
        return f"stayed at {first}{unit}"
    way = "fell" if after.value < before.value else "rose"
    unsure = "" if m.is_clear(sides, metric) in (True, None) else " (within chance)"
    return f"{way} from {first} to {second}{unit}{unsure}"


def _change(key: str, sides: Sides) -> float | None:
    moved = m.change(sides, m.BY_KEY[key])
    return None if moved is None else moved.value


def _ratio(key: str, sides: Sides) -> float | None:
    change = _change(key, sides)
    first = m.reading(sides["before"], m.BY_KEY[key])
    return None if change is None or first is None or first.value == 0 else change / first.value


def _points(change: float | None) -> str:
    return "unknown" if change is None else m.signed(change)
