"""Firing counts by token class, and what is found in them: contrast, DAPE, selected neurons.

Letters: L layers, K token classes (``GROUPS``), F neurons of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlalign.probes import _sets
from mlalign.probes._probe import GROUPS

SIDES = ("base", "adapted")
BAR, LOWEST = 0.95, 0.01
"""MMNeuron's percentile of all rates, and the share of neurons that it takes."""
MINER_SHARE = 0.02


@dataclass
class Counts:
    """What adds up over tokens and records."""

    tokens_K: np.ndarray
    fired_LKF: np.ndarray
    sum_LKF: np.ndarray | None
    """Sums of act(gate), and its maxima (-inf for no token); None where only firing is kept."""
    max_LKF: np.ndarray | None

    def rates_LKF(self) -> np.ndarray:
        """Firing rates; 0 in a class without tokens."""
        return self.fired_LKF / np.maximum(self.tokens_K, 1)[:, None]


def added(many: list[Counts]) -> Counts:
    """The counts of all tokens of ``many``."""
    sums = [c.sum_LKF for c in many if c.sum_LKF is not None]
    largest = [c.max_LKF for c in many if c.max_LKF is not None]
    return Counts(
        tokens_K=np.sum([c.tokens_K for c in many], axis=0),
        fired_LKF=np.asarray(sum(c.fired_LKF.astype(np.int64) for c in many)),
        sum_LKF=np.sum(sums, axis=0) if sums else None,
        max_LKF=np.max(largest, axis=0) if largest else None,
    )


def contrast(counts: Counts) -> np.ndarray:
    """(L, F): (f_img - f_txt) / (f_img + f_txt); NaN for a neuron that never fires."""
    fired, tokens = counts.fired_LKF, np.maximum(counts.tokens_K, 1)
    image = fired[:, 0] / tokens[0]
    text = fired[:, 1:].sum(1) / tokens[1:].sum()
    both = image + text
    return np.divide(image - text, both, out=np.full(both.shape, np.nan), where=both > 0)


def dape(rates_LKF: np.ndarray) -> np.ndarray:
    """(L, F): entropy in nats of the rates over classes; NaN for a neuron that never fires."""
    total = rates_LKF.sum(1)
    p = rates_LKF / np.where(total > 0, total, 1)[:, None]
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1)
    return np.where(total > 0, np.maximum(entropy, 0), np.nan)


def specific(rates_LKF: np.ndarray) -> dict[str, np.ndarray]:
    """Class -> sorted flat indices (layer * F + neuron) of its MMNeuron set."""
    bar = np.quantile(rates_LKF, BAR)
    entropy = dape(rates_LKF)
    candidates = (rates_LKF.max(1) > bar) & np.isfinite(entropy)
    order = np.argsort(np.where(candidates, entropy, np.inf), axis=None, kind="stable")
    size = min(max(1, round(LOWEST * entropy.size)), int(candidates.sum()))
    chosen = np.zeros(entropy.size, dtype=bool)
    chosen[order[:size]] = True
    above = {k: (rates_LKF[:, number] > bar).ravel() for number, k in enumerate(GROUPS)}
    return {k: np.flatnonzero(chosen & above[k]) for k in GROUPS}


def miner(counts: Counts) -> dict[str, np.ndarray]:
    """ "image", "text" -> sorted flat indices of the best 2 % by MINER's rate, mean and max."""
    assert counts.sum_LKF is not None and counts.max_LKF is not None
    found = {}
    for name, classes in (("image", [0]), ("text", [1, 2])):
        tokens = max(int(counts.tokens_K[classes].sum()), 1)
        parts = (
            counts.fired_LKF[:, classes].sum(1) / tokens,
            counts.sum_LKF[:, classes].sum(1) / tokens,
            counts.max_LKF[:, classes].max(1),
        )
        score_LF = np.mean([_scaled(part) for part in parts], axis=0)
        found[name] = _sets.top(score_LF, max(1, round(MINER_SHARE * score_LF.size)))
    return found


def _scaled(values_LF: np.ndarray) -> np.ndarray:
    """To 0 .. 1 within each layer; 0 where a layer does not vary."""
    low = values_LF.min(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        span = values_LF.max(1, keepdims=True) - low
        return np.nan_to_num((values_LF - low) / np.where(span > 0, span, 1))


def fired(many: list[Counts]) -> Counts:
    """Their firing counts alone, in the smallest type that holds them."""
    whole = added([Counts(c.tokens_K, c.fired_LKF, None, None) for c in many])
    small = np.min_scalar_type(int(whole.tokens_K.max(initial=0)))
    return Counts(whole.tokens_K, whole.fired_LKF.astype(small), None, None)


def merged(ranks: list[Any]) -> list[dict[str, Counts]]:
    """Blocks of all ranks, in the order of their numbers."""
    by_block: dict[int, list[dict[str, Counts]]] = {}
    for rank in ranks:
        for number, block in rank["blocks"].items():
            by_block.setdefault(number, []).append(block)
    return [
        {side: added([part[side] for part in by_block[number]]) for side in SIDES}
        for number in sorted(by_block)
    ]


def class_free(counts: Counts) -> np.ndarray:
    """(L, F): firing rate over all tokens."""
    return counts.fired_LKF.sum(1) / max(int(counts.tokens_K.sum()), 1)
