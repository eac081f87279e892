"""Top neurons of object words: their sets, what these hold, and how they overlap.

A record is {"id", "words": [(name, real)], "size": neurons of all layers, side: [a dict of
``top_sets`` for each word]}.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from mlalign.probes import _sets
from mlalign.probes._sets import Estimate

SIDES = ("base", "adapted")
LISTED = 5
"""Neurons listed for a noun and side in the table."""

Numbers = dict[tuple[str, int], list[float]]
"""(metric, layer) -> a number for each word of one record."""


def top_sets(scores_LMF: np.ndarray, count: int) -> list[dict[str, Any]]:
    """For each word: its top neurons (flat index), their scores, shares and sums by layer."""
    made = []
    for scores_LF in scores_LMF.transpose(1, 0, 2):
        chosen = _sets.top(scores_LF, count)
        positive_LF = np.maximum(scores_LF, 0)
        total = float(positive_LF.sum())
        by_layer = np.bincount(chosen // scores_LF.shape[1], minlength=len(scores_LF))
        held = float(positive_LF.ravel()[chosen].sum())
        random = float((by_layer * positive_LF.mean(1)).sum())
        made.append(
            {
                "top": chosen,
                "scores": scores_LF.ravel()[chosen],
                "top_share": held / total if total > 0 else float("nan"),
                "top_share_random": random / total if total > 0 else float("nan"),
                "score_L": scores_LF.sum(1),
            }
        )
    return made


def word_numbers(record: dict[str, Any], kind: str, side: str) -> Numbers:
    """(metric, layer) -> a number for each word of the kind."""
    made: Numbers = defaultdict(list)
    for at, (_, real) in enumerate(record["words"]):
        if real != (kind == "real"):
            continue
        old, new = record["base"][at], record["adapted"][at]
        one = old if side == "base" else new
        for metric in ("top_share", "top_share_random"):
            value = new[metric] - old[metric] if side == "delta" else one[metric]
            made[metric, -1].append(value)
        score_L = new["score_L"] - old["score_L"] if side == "delta" else one["score_L"]
        made["score", -1].append(float(score_L.sum()))
        for layer, value in enumerate(score_L):
            made["score", layer].append(float(value))
        if side == "delta":
            made["kept", -1].append(_sets.jaccard(old["top"], new["top"]))
    return made


def kept_random(records: list[Any], kind: str) -> Estimate:
    """Mean over words of what random sets of the sizes of their base and adapted sets give."""
    found = [
        _sets.random_jaccard(len(old["top"]), len(new["top"]), record["size"])
        for record in records
        for (_, real), old, new in zip(
            record["words"], record["base"], record["adapted"], strict=True
        )
        if real == (kind == "real")
    ]
    value, low, high = np.mean([each[:3] for each in found], axis=0)
    return Estimate(float(value), float(low), float(high))


def word_overlaps(records: list[Any], kind: str, side: str) -> list[Numbers]:
    """For each record, a mean overlap for each of its words with those of other records."""
    words = [
        (at, name, record[side][number]["top"])
        for at, record in enumerate(records)
        for number, (name, real) in enumerate(record["words"])
        if real == (kind == "real")
    ]
    made: list[Numbers] = [defaultdict(list) for _ in records]
    if not words:
        return made
    member_MU = _membership([top for _, _, top in words])
    common_MM = member_MU @ member_MU.T
    sizes_M = member_MU.sum(1)
    union_MM = sizes_M[:, None] + sizes_M[None, :] - common_MM
    overlap_MM = common_MM / np.maximum(union_MM, 1)
    at_M = np.array([at for at, _, _ in words])
    name_M = np.array([name for _, name, _ in words])
    for number, (at, name, _) in enumerate(words):
        elsewhere = at_M != at
        for metric, mask in (
            ("overlap_same_word", elsewhere & (name_M == name)),
            ("overlap_other_word", elsewhere & (name_M != name)),
        ):
            value = float(overlap_MM[number, mask].mean()) if mask.any() else float("nan")
            made[at][metric, -1].append(value)
    return made


def _membership(tops: list[np.ndarray]) -> np.ndarray:
    """(words, neurons that occur), float32: 1 where the neuron is in the word's set."""
    known, flat = np.unique(np.concatenate(tops), return_inverse=True)
    member = np.zeros((len(tops), len(known)), dtype=np.float32)
    member[np.repeat(np.arange(len(tops)), [len(top) for top in tops]), flat] = 1
    return member


def table(step: int, records: list[Any]) -> list[dict[str, Any]]:
    """For each side and noun the neurons that are in most of its top sets."""
    return [
        {"step": step, "side": side, "word": name, **row}
        for side in SIDES
        for name, each in sorted(_by_noun(records, side).items())
        for row in _listed(each)
    ]


def _by_noun(records: list[Any], side: str) -> dict[str, list[tuple[dict[str, Any], int]]]:
    """Noun -> (top set, neurons of a layer) of each of its occurrences."""
    found: dict[str, list[tuple[dict[str, Any], int]]] = defaultdict(list)
    for record in records:
        for (name, _), word in zip(record["words"], record[side], strict=True):
            found[name].append((word, record["size"] // len(word["score_L"])))
    return found


def _listed(occurrences: list[tuple[dict[str, Any], int]]) -> list[dict[str, Any]]:
    counts: Counter[tuple[int, int]] = Counter()
    scores: dict[tuple[int, int], float] = defaultdict(float)
    for word, width in occurrences:
        for index, score in zip(word["top"].tolist(), word["scores"], strict=True):
            counts[divmod(index, width)] += 1
            scores[divmod(index, width)] += float(score)
    # By count, then by score, then by place: the same list on every rank.
    order = sorted(counts, key=lambda at: (-counts[at], -scores[at] / counts[at], at))
    return [
        {
            "layer": at[0],
            "neuron": at[1],
            "count": counts[at],
            "of": len(occurrences),
            "score": scores[at] / counts[at],
        }
        for at in order[:LISTED]
    ]
