"""The weighted sum of several rewards, with every term kept for the log.

    total  = sum over terms of weight * reward
    spans  = the spans of all terms that have them, weighted; those of different terms may overlap
    level  = weighted sum of the terms of the answer as a whole
    total  = level + sum of the scores of the spans

Nothing is normalised here: that is the credit's affair (``mlalign.credit``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from mlalign import methods
from mlalign.rewards._reward import Completion, Reward, RewardContext, checked

ROOM = "mlalign.rewards"


class TermSpan(NamedTuple):
    """A weighted span."""

    start: int
    end: int
    """Characters [start, end) of the answer."""
    score: float
    """Weighted."""
    term: str
    """Name of the reward that gave it."""


@dataclass(frozen=True, kw_only=True)
class Combined:
    """What one completion is worth, whole and in parts."""

    id: str
    """Of the completion."""
    spans: tuple[TermSpan, ...]
    level: float
    """Weighted sum of the terms without spans."""
    total: float
    """``level`` and the scores of all spans."""
    terms: Mapping[str, float]
    """Reward by term, before its weight."""
    counts: Mapping[str, float]
    """"term/count" -> what the term found on the way."""


class Term(NamedTuple):
    """One reward of the sum."""

    name: str
    weight: float
    reward: Reward


class Rewards:
    """Several rewards as one."""

    def __init__(self, terms: Sequence[Term]) -> None:
        """Raises ValueError for no term, a name that is given twice, and a weight that is no finite
        number."""
        if not terms:
            raise ValueError("no reward: name at least one of mlalign/rewards")
        names = [term.name for term in terms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"reward {twice[0]} is given twice: its terms could not be told apart")
        for term in terms:
            if not math.isfinite(term.weight):
                raise ValueError(f"reward {term.name}: a weight of {term.weight}")
        self.terms = tuple(terms)

    def score_group(self, completions: Sequence[Completion]) -> list[Combined]:
        """One per completion, in order; all completions of an image are best given together.

        Raises RewardError and RewardUnavailable as ``checked`` does. No state changes but caches,
        so that a call that failed can be made again.
        """
        given = [checked(term.name, term.reward, completions) for term in self.terms]
        return [
            self._combined(completion, [scored[i] for scored in given])
            for i, completion in enumerate(completions)
        ]

    def _combined(self, completion: Completion, scored: Sequence[Any]) -> Combined:
        pairs = list(zip(self.terms, scored, strict=True))
        spans = sorted(
            TermSpan(span.start, span.end, term.weight * span.score, term.name)
            for term, each in pairs
            for span in each.spans
        )
        level = math.fsum(t.weight * s.total for t, s in pairs if not t.reward.spans)
        return Combined(
            id=completion.id,
            spans=tuple(spans),
            level=level,
            total=level + math.fsum(span.score for span in spans),
            terms={term.name: each.total for term, each in pairs},
            counts={
                f"{term.name}/{key}": float(value)
                for term, each in pairs
                for key, value in each.counts.items()
            },
        )


def build(named: Sequence[tuple[str, float, Mapping[str, Any]]], context: RewardContext) -> Rewards:
    """Rewards from (file name or "package.module:Name", weight, settings), in order.

    Raises ``methods.UnknownMethod``, pydantic's ValidationError, and ValueError for what a reward
    needs and the context does not have.
    """
    terms = []
    for name, weight, settings in named:
        method = methods.find(ROOM, name)
        terms.append(Term(name, weight, method(method.Settings(**settings), context)))
    return Rewards(terms)


def columns(combined: Sequence[Combined]) -> dict[str, list[float]]:
    """What is logged of each completion, by name: gather these over processes, then ``summary``.

    ``reward`` and ``reward/level`` are weighted, ``rewards/<term>`` not; counts lie under
    ``rewards/<term>/``.
    """
    table: dict[str, list[float]] = {
        "reward": [c.total for c in combined],
        "reward/level": [c.level for c in combined],
    }
    for key in combined[0].terms if combined else ():
        table[f"rewards/{key}"] = [c.terms[key] for c in combined]
    for key in sorted({key for c in combined for key in c.counts}):
        table[f"rewards/{key}"] = [c.counts.get(key, 0.0) for c in combined]
    return table


def summary(table: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Means over completions, under TRL's names where it has one: ``reward``, ``reward_std``,
    ``rewards/<term>/mean``, ``rewards/<term>/std`` (n - 1; NaN of one completion); counts by their
    own name."""
    out: dict[str, float] = {}
    for key, values in table.items():
        spread = stdev(values) if len(values) > 1 else math.nan
        if key == "reward":
            out |= {key: fmean(values), "reward_std": spread}
        elif key.startswith("rewards/") and key.count("/") == 1:
            out |= {f"{key}/mean": fmean(values), f"{key}/std": spread}
        else:
            out[key] = fmean(values)
    return out
