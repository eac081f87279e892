"""Percentile bootstrap over images: ratios are recomputed on each resample. Vectorised, seeded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from mlalign.benchmarks._items import Metric

LEVEL = 0.95


@lru_cache(maxsize=4)
def weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, images) float64: how often each image occurs in each resample."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, images, size=(resamples, images))
    offset = np.arange(resamples)[:, None] * images
    counts = np.bincount((drawn + offset).ravel(), minlength=resamples * images)
    return counts.reshape(resamples, images).astype(np.float64)


def interval(values_B: np.ndarray) -> tuple[float, float] | None:
    """The 95 % percentile interval; None where no resample has a value."""
    defined = values_B[np.isfinite(values_B)]
    if not len(defined):
        return None
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def summarise(metrics: Mapping[str, Metric], resamples: int, seed: int) -> dict[str, object]:
    """``{key: value, key_ci95: [low, high], key_n: images}``; an undefined value has no key."""
    flat: dict[str, object] = {}
    for key, metric in metrics.items():
        value = metric.value()
        if not np.isfinite(value):
            continue
        bounds = interval(metric.resampled(weights(metric.numerator_PI.shape[1], resamples, seed)))
        flat[key] = value
        flat[f"{key}_ci95"] = list(bounds) if bounds else [value, value]
        flat[f"{key}_n"] = metric.images
    return flat


def differences(
    before: Mapping[str, Metric], after: Mapping[str, Metric], resamples: int, seed: int
) -> dict[str, object]:
    """``after - before`` of every metric that both have, with its paired 95 % interval.

    Both sides hold the same images in the same order, and each resample draws the same images on
    both.
    """
    flat: dict[str, object] = {}
    for key in before:
        if key not in after:
            continue
        one, two = before[key], after[key]
        images = one.numerator_PI.shape[1]
        if two.numerator_PI.shape[1] != images:
            raise ValueError(
                f"{key}: {images} images before, {two.numerator_PI.shape[1]} after. "
                "Evaluate both on the same images"
            )
        change = two.value() - one.value()
        if not np.isfinite(change):
            continue
        drawn = weights(images, resamples, seed)
        bounds = interval(two.resampled(drawn) - one.resampled(drawn))
        flat[key] = change
        flat[f"{key}_ci95"] = list(bounds) if bounds else [change, change]
    return flat
