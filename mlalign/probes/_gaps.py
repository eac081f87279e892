"""What another view of the image costs each completion and each object word, and how it reads.

A *quantity* is a number per response token: log-probs under a view, or a divergence between views.
An *entry* is a set of tokens of one record: each completion (own, chosen, rejected), then each
object word (real or absent) of each. Kept per record are sums over the tokens of every entry, so
gaps between views and between sides are differences of what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlalign.branching.batch import ProbeReading, TokenLogps
from mlalign.probes._probe import ProbeBatch, Watch
from mlalign.probes._records import COMPLETIONS
from mlalign.probes._stats import interval
from mlalign.probes._summaries import SIDES, separation

WORDS = ("real", "absent")
CHOSEN, REJECTED = COMPLETIONS.index("chosen"), COMPLETIONS.index("rejected")

Quantity = Callable[[dict[str, np.ndarray]], np.ndarray]
"""What is kept of one record and side -> (E,) sums over each entry's tokens. It must be linear:
the side "delta" is it of the difference."""


@dataclass(frozen=True, kw_only=True)
class Entries:
    """One record's entries: the completions in the order of ``COMPLETIONS``, then the words."""

    id: str
    groups: np.ndarray
    """(E,) str: the completion's name, or "real" or "absent"."""
    tokens: np.ndarray
    """(E,) how many tokens each has."""
    base: dict[str, np.ndarray]
    """Quantity -> (E,): sum over each entry's tokens."""
    adapted: dict[str, np.ndarray]

    def side(self, name: str) -> dict[str, np.ndarray]:
        """Of "base", "adapted", or "delta": adapted minus base."""
        if name == "delta":
            return {key: self.adapted[key] - self.base[key] for key in self.adapted}
        return self.base if name == "base" else self.adapted


class TokenWatch(Watch):
    """Keeps the log-prob of every response token under every view; a subclass may add to it."""

    def __init__(self, batch: ProbeBatch) -> None:
        super().__init__(batch)
        self.tokens: dict[str, np.ndarray] = {}
        """Quantity -> (C, S), in the batch's order of completions; 0 at padding."""

    def logps(self, view: str, logps: TokenLogps) -> None:
        """Keep them, under the view's name."""
        self.tokens[view] = logps.logps_CS.double().cpu().numpy()

    def of(self, index: int) -> dict[str, np.ndarray]:
        """Quantity -> (E,) of the item with this number in the probe set."""
        row = [item.index for item in self.batch.items].index(index)
        first, words = row * len(COMPLETIONS), self.batch.items[row].mentions
        sums = {}
        for name, table_CS in self.tokens.items():
            own_KS = table_CS[first : first + len(COMPLETIONS)]
            by_word = [
                own_KS[k, list(m.tokens)].sum() for k, each in enumerate(words) for m in each
            ]
            sums[name] = np.array([*own_KS.sum(-1), *by_word])
        return sums


def entries(batch: ProbeBatch, before: TokenWatch, after: TokenWatch) -> list[Entries]:
    """Both sides of every item of the batch."""
    made = []
    for item in batch.items:
        words = [mention for each in item.mentions for mention in each]
        made.append(
            Entries(
                id=item.record.id,
                groups=np.array([*COMPLETIONS, *(WORDS[not m.real] for m in words)]),
                tokens=np.array(
                    [*map(len, item.completions), *(len(m.tokens) for m in words)], dtype=float
                ),
                base=before.of(item.index),
                adapted=after.of(item.index),
            )
        )
    return made


def spread(
    fixed: dict[str, Any],
    metric: str,
    records: Sequence[Entries],
    repeats: Sequence[Entries],
    quantity: Quantity,
    *,
    per_token: bool,
) -> list[ProbeReading]:
    """A quantity on each side and group: of every record, and over the set.

    Sums over an entry's tokens, of completions alone, or means over them (``per_token``), of words
    too. A record's value is the mean of its entries in the group, the set's the mean of all
    entries; intervals draw whole records. The noise is the mean absolute difference that
    ``repeats`` have between their two sides.
    """
    made: list[ProbeReading] = []
    for side in SIDES:
        for group in (*COMPLETIONS, *(WORDS if per_token else ())):
            here = {**fixed, "metric": metric, "side": side, "group": group}
            values = [_values(each, side, group, quantity, per_token) for each in records]
            floor = [_values(each, "delta", group, quantity, per_token) for each in repeats]
            made.append(_over_set(here, values, floor))
            made += [
                ProbeReading(record=each.id, value=float(v.mean()), n=len(v), **here)
                for each, v in zip(records, values, strict=True)
                if len(v)
            ]
    return made


def _values(
    record: Entries, side: str, group: str, quantity: Quantity, per_token: bool
) -> np.ndarray:
    """The record's entries of a group."""
    picked = record.groups == group
    sums = quantity(record.side(side))[picked]
    return sums / record.tokens[picked] if per_token else sums


def _over_set(
    here: dict[str, Any], values: Sequence[np.ndarray], floor: Sequence[np.ndarray]
) -> ProbeReading:
    count = sum(map(len, values))
    if not count:
        return ProbeReading(record="", n=0, **here)
    sums = [float(v.sum()) for v in values]
    low, high = interval(sums, [len(v) for v in values])
    again = np.abs(np.concatenate(floor)) if floor else np.zeros(0)
    return ProbeReading(
        record="",
        value=math.fsum(sums) / count,
        lo=low,
        hi=high,
        noise=float(again.mean()) if len(again) else math.nan,
        n=count,
        **here,
    )


def words_apart(
    fixed: dict[str, Any],
    metric: str,
    records: Sequence[Entries],
    repeats: Sequence[Entries],
    quantity: Quantity,
) -> list[ProbeReading]:
    """AUROC of a quantity per token, P(a real word has more than an absent one), of both models.

    NaN, and n 0, where either kind of word is missing or a word's number is not finite.
    """
    again = [_separation(repeats, side, quantity)[0] for side in ("base", "adapted")]
    floor = abs(again[1] - again[0])
    made = []
    for side in ("base", "adapted"):
        value, low, high = _separation(records, side, quantity)
        count = sum(int(np.isin(each.groups, WORDS).sum()) for each in records)
        made.append(
            ProbeReading(
                metric=metric,
                side=side,
                record="",
                value=value,
                noise=floor,
                lo=low,
                hi=high,
                n=count if math.isfinite(value) else 0,
                **fixed,
            )
        )
    return made


def _separation(
    records: Sequence[Entries], side: str, quantity: Quantity
) -> tuple[float, float, float]:
    """AUROC and its interval."""
    real, absent = (
        [_values(each, side, group, quantity, True) for each in records] for group in WORDS
    )
    if not all(np.isfinite(each).all() for each in (*real, *absent)):
        return math.nan, math.nan, math.nan
    return separation([each.tolist() for each in real], [each.tolist() for each in absent])


def preferences(
    fixed: dict[str, Any],
    records: Sequence[Entries],
    repeats: Sequence[Entries],
    view: str,
    name: str,
) -> list[ProbeReading]:
    """What the pair's preference is under a view, log pi(chosen) - log pi(rejected), on each side.

    margin_<name>, nats, of every record and over the set; kept_<name>, the share of pairs whose
    margin has the same sign with the image. A margin of exactly zero has no sign and is left out.
    """
    made: list[ProbeReading] = []
    for side in SIDES:
        here = {**fixed, "side": side}
        seen, changed = (np.array([_margin(r, side, v) for r in records]) for v in ("image", view))
        floor = [np.array([_margin(r, "delta", view)]) for r in repeats]
        made.append(_over_set({**here, "metric": f"margin_{name}"}, list(changed[:, None]), floor))
        made += [
            ProbeReading(metric=f"margin_{name}", record=each.id, value=float(margin), **here)
            for each, margin in zip(records, changed, strict=True)
        ]
        signed = (seen != 0) & (changed != 0)
        kept = (np.sign(seen) == np.sign(changed))[signed].astype(float)
        made.append(_over_set({**here, "metric": f"kept_{name}"}, list(kept[:, None]), []))
    return made


def _margin(record: Entries, side: str, view: str) -> float:
    sums = record.side(side)[view]
    return float(sums[CHOSEN] - sums[REJECTED])
