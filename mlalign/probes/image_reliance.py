"""Does the answer, and the preference between answers, depend on the image at all?

With v the record's image, v0 a uniform one of the processor's mean colour ("blank") or another
record's image ("swapped"), and log pi summed over the answer's tokens, end of turn included:

    <view>              log pi(y | x, v) - log pi(y | x, v0)         nats per response
    <view>_per_token    the same / tokens of y                       nats per token
    preferred           share of pairs with log pi(chosen) > log pi(rejected), with the image
    kept_<view>         share of pairs whose preference has the same sign without the image

Groups of the first two are own, chosen and rejected. Sides: "base" and "adapted" are the models by
themselves, where a pair's margin is log pi(chosen) - log pi(rejected); "delta" is adapted minus
base, where the margin is the implicit reward's of DPO without its beta. A margin of exactly zero
has no sign and is left out (all are, before the first step, on side "delta"); ``n`` says how many
pairs remain. ``kept`` near 1 on side "delta" is the unconditional preference of mDPO (arXiv
2406.11839): what was learned does not look. Means over records, with 95 % intervals over them; the
noise is the mean absolute difference between two runs of the same model (of a share: the difference
of the two). Where the set has one image only there is nothing to swap, and no reading of it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from mlalign.branching.batch import ProbeReading, TokenLogps
from mlalign.models._vlm import VLM
from mlalign.probes._probe import BLANK, SWAPPED, Probe, ProbeBatch, Watch
from mlalign.probes._records import COMPLETIONS
from mlalign.probes._stats import interval

VIEWS = (BLANK, SWAPPED)
CHOSEN, REJECTED = COMPLETIONS.index("chosen"), COMPLETIONS.index("rejected")


class Settings(BaseModel):
    """No settings: the views are fixed, so that runs compare."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Reliance(Watch):
    def __init__(self, batch: ProbeBatch) -> None:
        super().__init__(batch)
        self.sums: dict[str, np.ndarray] = {}
        """View -> (items, completions): summed log-probs."""
        self.lengths = np.zeros(0)

    def logps(self, view: str, logps: TokenLogps) -> None:
        """Keep the sum over tokens of every completion."""
        shape = (len(self.batch.items), len(COMPLETIONS))
        # Differences of sums are read: in float32 a sum of 200 nats is rounded to 1e-5.
        sums_C = (logps.logps_CS.double() * logps.mask_CS).sum(-1)
        self.sums[view] = sums_C.cpu().numpy().reshape(shape)
        self.lengths = logps.lengths_C().cpu().numpy().reshape(shape)

    def of(self, index: int) -> dict[str, np.ndarray]:
        """View -> (completions,) of the item with this number in the probe set."""
        row = [item.index for item in self.batch.items].index(index)
        return {view: sums[row] for view, sums in self.sums.items()}


class ImageReliance(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "image_reliance"
    prefix = "probe/image_reliance"
    headline = "adapted"
    needs = frozenset({BLANK, SWAPPED})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Keeps summed log-probs of every view."""
        return _Reliance(batch)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Log-probs of every view and side, by item."""
        assert isinstance(before, _Reliance) and isinstance(after, _Reliance)
        return [
            {
                "id": item.record.id,
                "lengths": np.array([len(ids) for ids in item.completions]),
                "base": before.of(item.index),
                "adapted": after.of(item.index),
            }
            for item in batch.items
        ]

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Reliance per record and over the set; preferences over the set."""
        records = [_with_delta(value) for rank in values for value in rank]
        repeats = [_with_delta(value) for rank in noise for value in rank]
        made: list[ProbeReading] = []
        for side in ("base", "adapted", "delta"):
            fixed = {"step": step, "probe": self.name, "side": side}
            for view in _views(records):
                for end, divide in (("", False), ("_per_token", True)):
                    gaps_NK = _gaps(records, side, view, divide)
                    floor_K = np.abs(_gaps(repeats, "delta", view, divide)).mean(0)
                    ids = [record["id"] for record in records]
                    made += _reliance(fixed, view + end, ids, gaps_NK, floor_K)
            made += _preferences(fixed, records, repeats)
        return made


def _views(records: list[Any]) -> list[str]:
    """The views without the image that were run."""
    return [view for view in VIEWS if view in records[0]["adapted"]]


def _with_delta(value: dict[str, Any]) -> dict[str, Any]:
    base, adapted = value["base"], value["adapted"]
    return {**value, "delta": {view: adapted[view] - base[view] for view in adapted}}


def _gaps(records: list[Any], side: str, view: str, divide: bool) -> np.ndarray:
    """(N, completions): log-prob with the image minus without it."""
    return np.stack(
        [
            (record[side]["image"] - record[side][view]) / (record["lengths"] if divide else 1)
            for record in records
        ]
    )


def _reliance(
    fixed: dict[str, Any], metric: str, ids: list[str], gaps_NK: np.ndarray, floor_K: np.ndarray
) -> list[ProbeReading]:
    made = []
    for k, group in enumerate(COMPLETIONS):
        gaps = gaps_NK[:, k]
        made.append(_mean(fixed, metric, gaps, float(floor_K[k]), group))
        made += [
            ProbeReading(metric=metric, record=record, group=group, value=float(gap), **fixed)
            for record, gap in zip(ids, gaps, strict=True)
        ]
    return made


def _mean(
    fixed: dict[str, Any], metric: str, each: np.ndarray, noise: float, group: str = ""
) -> ProbeReading:
    """The mean over records with its interval; NaN over none."""
    low, high = interval(each.astype(float).tolist(), [1] * len(each))
    return ProbeReading(
        metric=metric,
        record="",
        group=group,
        value=float(each.mean()) if len(each) else math.nan,
        noise=noise,
        lo=low,
        hi=high,
        n=len(each),
        **fixed,
    )


def _preferences(
    fixed: dict[str, Any], records: list[Any], repeats: list[Any]
) -> list[ProbeReading]:
    """Margins of every pair and view, and the shares of pairs that keep their sign."""
    margins = _margins(records, fixed["side"])
    once, again = (_margins(repeats, side) for side in ("base", "adapted"))
    made = [
        ProbeReading(metric=f"margin_{view}", record=record["id"], value=float(margin), **fixed)
        for view, each in margins.items()
        for record, margin in zip(records, each, strict=True)
    ]
    for view, each in margins.items():
        floor = float(np.abs(again[view] - once[view]).mean())
        made.append(_mean(fixed, f"margin_{view}", each, floor))
    floors = [_shares(once), _shares(again)]
    for metric, each in _shares(margins).items():
        one, other = (kept[metric] for kept in floors)
        # The sign of a difference of two runs of one model means nothing: no floor for "delta".
        known = fixed["side"] != "delta" and len(one) and len(other)
        floor = abs(float(one.mean() - other.mean())) if known else math.nan
        made.append(_mean(fixed, metric, each, floor))
    return made


def _margins(records: list[Any], side: str) -> dict[str, np.ndarray]:
    """View -> log pi(chosen) - log pi(rejected) of every record."""
    return {
        view: np.array([r[side][view][CHOSEN] - r[side][view][REJECTED] for r in records])
        for view in ("image", *_views(records))
    }


def _shares(margins: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Metric -> for each pair that has a sign, whether it counts."""
    signed = margins["image"] != 0
    shares = {"preferred": (margins["image"] > 0)[signed]}
    for view, each in margins.items():
        if view != "image":
            both = signed & (each != 0)
            shares[f"kept_{view}"] = (np.sign(margins["image"]) == np.sign(each))[both]
    return shares


METHOD = ImageReliance
