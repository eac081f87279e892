"""Statistics that probes share: similarity, separation, intervals, spectra. numpy and torch.

Formulae: debiased HSIC and CKA, Song et al. 2012 eq. 5 and Kornblith et al. 2019; effective rank,
Roy and Vetterli 2007.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA of (n, d) and (n, e) features with the unbiased estimate of HSIC.

    The biased one grows with d / n (independent data can give 0.66); this one is about 0 for
    independent data, 1 for an orthogonal map or a scaling, and may be slightly negative. Needs
    n >= 4; NaN for fewer, and where either side does not vary.
    """
    if len(x) < 4:
        return float("nan")
    gram_x, gram_y = _centred_gram(x), _centred_gram(y)
    xy, xx, yy = (np.sum(a * b) for a, b in ((gram_x, gram_y), (gram_x, gram_x), (gram_y, gram_y)))
    return float(xy / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else float("nan")


def _centred_gram(x: np.ndarray) -> np.ndarray:
    """The U-centred Gram matrix: its inner products are n (n - 3) times the unbiased HSIC."""
    x = np.asarray(x, dtype=np.float64)
    # Centring first changes nothing in exact arithmetic and keeps large common offsets harmless.
    x = x - x.mean(0)
    n = len(x)
    gram = x @ x.T
    np.fill_diagonal(gram, 0.0)
    means = gram.sum(1) / (n - 2)
    centred = gram - means[:, None] - means[None, :] + gram.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0.0)
    return centred


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """P(a positive value exceeds a negative one), ties half. NaN where either side is empty, or
    where a value is not finite: it has no rank."""
    if not len(positive) or not len(negative) or not np.isfinite([*positive, *negative]).all():
        return float("nan")
    labels = [1] * len(positive) + [0] * len(negative)
    return float(roc_auc_score(labels, [*positive, *negative]))


def interval(
    sums: Sequence[float], counts: Sequence[float], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval, over records, of sum(sums) / sum(counts).

    A record with several words is drawn whole, so words of one image do not count as independent.
    NaN where nothing was counted.
    """
    low, high = intervals(np.reshape(sums, (-1, 1)), np.asarray(counts), resamples, seed)
    return float(low[0]), float(high[0])


def intervals(
    sums_NX: np.ndarray, counts_N: np.ndarray, resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """``interval`` of many numbers (X) at once, the same records drawn for all: ends (X), (X)."""
    kept_N = np.asarray(counts_N) > 0
    if not kept_N.any():
        nothing = np.full(np.shape(sums_NX)[1], np.nan)
        return nothing, nothing
    values_BX = resampled(sums_NX[kept_N], np.asarray(counts_N)[kept_N, None], resamples, seed)
    low_X, high_X = np.percentile(values_BX, [2.5, 97.5], axis=0)
    return low_X, high_X


def resampled(
    sums_NX: np.ndarray, counts_NX: np.ndarray, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """(resamples, X): sum(sums) / sum(counts) over records that are drawn with replacement, the
    same for all X. NaN where nothing was counted."""
    times_BN = drawn_times(len(sums_NX), resamples, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (times_BN @ np.float64(sums_NX)) / (times_BN @ np.float64(counts_NX))


@functools.lru_cache(maxsize=16)
def drawn_times(records: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """(resamples, records), read-only: how often each record was drawn, with replacement.

    A sum over a sample is then a product. Thousands of numbers of a pass are drawn alike.
    """
    drawn_BN = np.random.default_rng(seed).integers(0, records, (resamples, records))
    times_BN = np.zeros((resamples, records))
    np.add.at(times_BN, (np.arange(resamples)[:, None], drawn_BN), 1)
    times_BN.flags.writeable = False
    return times_BN


def update_spectrum(lora_b: Tensor, lora_a: Tensor, scaling: float) -> Tensor:
    """Singular values of ``scaling * B @ A``, without forming it. float64, descending.

    ``lora_b``: (out, r); ``lora_a``: (r, in). QR of both leaves an r x r matrix:
    B A = Q_b (R_b R_a^T) Q_a^T. NaN where a weight is not finite.
    """
    _, upper_b = torch.linalg.qr(lora_b.detach().double(), mode="r")
    _, upper_a = torch.linalg.qr(lora_a.detach().double().T, mode="r")
    product = upper_b @ upper_a.T
    if not torch.isfinite(product).all():
        return torch.full((min(product.shape),), float("nan"), dtype=torch.float64)
    return torch.linalg.svdvals(product) * abs(scaling)


def effective_rank(singular: Tensor) -> float:
    """exp(entropy of the singular values as a distribution); 0 for a zero matrix, NaN for NaN."""
    total = singular.sum()
    if not torch.isfinite(total):
        return float("nan")
    if total <= 0:
        return 0.0
    p = singular / total
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))


def relative(numerator: float, denominator: float) -> float:
    """Their ratio; exactly 0 for a zero numerator, NaN for a zero denominator otherwise."""
    if numerator == 0:
        return 0.0
    return numerator / denominator if denominator > 0 else float("nan")
