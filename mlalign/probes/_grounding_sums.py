"""Sums over tokens and words of attention_grounding's metrics, and the readings they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlalign.branching.batch import ProbeReading
from mlalign.probes._stats import interval, intervals

ROW_METRICS = (
    "image_mass",
    "image_mass_no_first",
    "entropy",
    "row_entropy",
    "sink_first",
    "sink_image",
)
BOX_METRICS = ("box_share", "box_lift")
WORD_GROUPS = ("real", "absent")


@dataclass
class Totals:
    """Sums over a record's tokens or words of one metric, (N, L, H), and how many they are."""

    base: np.ndarray
    adapted: np.ndarray
    counts: np.ndarray

    def difference(self) -> np.ndarray:
        """Adapted minus base."""
        return self.adapted - self.base

    def floor(self) -> np.ndarray:
        """(L, H): mean absolute difference of the two sides; NaN where nothing was counted."""
        total = self.counts.sum()
        sums_LH = np.abs(self.difference()).sum(0)
        return sums_LH / total if total else np.full_like(sums_LH, np.nan)


def totals(records: list[Any]) -> dict[tuple[str, str], Totals]:
    """(metric, group) -> sums of both sides."""
    table = {}
    for number, metric in enumerate((*ROW_METRICS, *BOX_METRICS)):
        groups = WORD_GROUPS if metric in ROW_METRICS else ("real",)
        for group in groups:
            picked = [_picked(record, metric, group) for record in records]
            sums = {
                side: np.stack(
                    [
                        # (W, L, M, H) -> (L, H): the picked words of the record
                        np.stack(record[side].words, 1)[pick, :, number].sum(0)
                        for record, pick in zip(records, picked, strict=True)
                    ]
                )
                for side in ("base", "adapted")
            }
            table[metric, group] = Totals(**sums, counts=np.array([len(p) for p in picked]))
        if metric in ROW_METRICS:
            counts = np.array([record["adapted"].tokens for record in records])
            sums = {
                side: np.stack([np.stack(r[side].response)[:, number] for r in records])
                * counts[:, None, None]
                for side in ("base", "adapted")
            }
            table[metric, "response"] = Totals(**sums, counts=counts)
    return table


def _picked(record: Any, metric: str, group: str) -> list[int]:
    """Numbers of the record's words that count for a metric and group."""
    return [
        number
        for number, (_, mention, box) in enumerate(record["words"])
        if mention.real == (group == "real") and (box or metric in ROW_METRICS)
    ]


def over_set(
    fixed: dict[str, Any],
    metric: str,
    sums_NLH: np.ndarray,
    counts: np.ndarray,
    noise_LH: np.ndarray | None,
) -> list[ProbeReading]:
    """Over the set: per head, and the mean over layers and heads; one NaN with n = 0 over none."""
    total = int(counts.sum())
    if not total:
        return [ProbeReading(metric=metric, record="", n=0, **fixed)]
    means_LH = sums_NLH.sum(0) / total
    noise_LH = np.full(means_LH.shape, np.nan) if noise_LH is None else noise_LH
    low_LH, high_LH = (v.reshape(means_LH.shape) for v in intervals(_flat(sums_NLH), counts))
    made = [
        ProbeReading(
            metric=metric,
            record="",
            layer=layer,
            head=head,
            value=float(means_LH[layer, head]),
            noise=float(noise_LH[layer, head]),
            lo=float(low_LH[layer, head]),
            hi=float(high_LH[layer, head]),
            n=total,
            **fixed,
        )
        for layer, head in np.ndindex(means_LH.shape)
    ]
    low, high = interval(sums_NLH.mean((1, 2)).tolist(), counts.tolist())
    whole = ProbeReading(
        metric=metric,
        record="",
        value=float(means_LH.mean()),
        noise=float(noise_LH.mean()),
        lo=low,
        hi=high,
        n=total,
        **fixed,
    )
    return [*made, whole]


def _flat(values_NLH: np.ndarray) -> np.ndarray:
    return values_NLH.reshape(len(values_NLH), -1)


def per_record(
    fixed: dict[str, Any], metric: str, ids: list[str], sums_NLH: np.ndarray, counts: np.ndarray
) -> list[ProbeReading]:
    """Per record and layer, mean over heads; layer -1 is the mean over layers."""
    made = []
    for record, sums_LH, count in zip(ids, sums_NLH, counts.tolist(), strict=True):
        if count:
            by_layer = sums_LH.mean(-1) / count
            for layer, value in ((-1, by_layer.mean()), *enumerate(by_layer)):
                made.append(
                    ProbeReading(
                        metric=metric,
                        record=record,
                        layer=layer,
                        value=float(value),
                        n=count,
                        **fixed,
                    )
                )
    return made
