"""Views: completions behind the pairs of a batch, for objectives that compare more than two.

A view is one more completion per pair. Its tokens may stand in rows of their own (the chosen answer
behind another image), or be other targets at the positions of the chosen answer, which needs no
further row: the hidden states are there.

The noise of a noised image stands here too: objectives and probes show the same one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mlalign.branching.batch import PrefixBatch, TokenLogps
from mlalign.branching.head import tile_tokens
from mlalign.branching.logps import head_outputs

STEPS = 1000
"""Steps of the diffusion."""
_FIRST, _LAST = 1e-5, 0.5e-2
"""Bounds of its betas."""


def by_view(logps: TokenLogps, batch: PrefixBatch) -> TokenLogps:
    """Log-probs of all completions (C, S) as those of the pairs (2N, S), with ``views`` (N, S)."""
    pairs = batch.num_pairs
    if not batch.views:
        return logps
    starts = {name: (2 + number) * pairs for number, name in enumerate(batch.views)}
    views = {name: _part(logps, slice(start, start + pairs)) for name, start in starts.items()}
    return replace(_part(logps, slice(0, 2 * pairs)), views=views)


def argmax_tokens(model: nn.Module, batch: PrefixBatch, attention: str = "auto") -> Tensor:
    """(C, S) int64: the likeliest token at each completion position, teacher-forced on the
    completion; 0 at padding. No gradient. ``batch``: with features.

    Ties go to the smaller id.
    """
    rows_CS = batch.row_C[:, None].expand_as(batch.source_CS)

    def head(linear: nn.Linear, hidden_RTD: Tensor) -> Tensor:
        hidden_MD = hidden_RTD[rows_CS[batch.mask_CS], batch.source_CS[batch.mask_CS]]
        tiles = hidden_MD.split(tile_tokens(len(linear.weight)))
        return torch.cat([linear_argmax(linear, tile) for tile in tiles])

    with torch.no_grad():
        found_M = head_outputs(model, batch, attention, head)
    return torch.zeros_like(batch.target_CS).masked_scatter(batch.mask_CS, found_M)


def linear_argmax(linear: nn.Linear, hidden_MD: Tensor) -> Tensor:
    """(M,) int64: the row of the head's weight that answers each hidden state most."""
    return nn.functional.linear(hidden_MD, linear.weight, linear.bias).argmax(-1)


def with_targets(batch: PrefixBatch, name: str, target_NS: Tensor) -> PrefixBatch:
    """The batch with other tokens scored at the positions of each chosen answer, as view ``name``.

    ``target_NS``: int64, as wide as the batch's completions or narrower. The tokens that the model
    reads stay those of the chosen answer. Raises ValueError where a chosen answer is longer.
    """
    chosen = slice(0, 2 * batch.num_pairs, 2)
    mask_NS = batch.mask_CS[chosen]
    if mask_NS[:, target_NS.shape[1] :].any():
        raise ValueError(f"view {name!r}: fewer targets than the chosen answer has tokens")
    wide_NS = torch.zeros_like(batch.target_CS[chosen])
    wide_NS[:, : target_NS.shape[1]] = target_NS
    edited = batch.edited_CS
    return replace(
        batch,
        row_C=torch.cat([batch.row_C, batch.row_C[chosen]]),
        source_CS=torch.cat([batch.source_CS, batch.source_CS[chosen]]),
        target_CS=torch.cat([batch.target_CS, wide_NS.masked_fill(~mask_NS, 0)]),
        mask_CS=torch.cat([batch.mask_CS, mask_NS]),
        last_C=torch.cat([batch.last_C, batch.last_C[chosen]]),
        ids_C=batch.ids_C + batch.ids_C[chosen],
        sides_C=batch.sides_C + (name,) * batch.num_pairs if batch.sides_C else (),
        edited_CS=None if edited is None else torch.cat([edited, torch.zeros_like(edited[chosen])]),
        views=(*batch.views, name),
    )


@cache
def signal(step: int) -> float:
    """a_t after ``step`` (index from 0): what is left of the image's variance.

    0.74480 at 500, 0.21810 at 800, 0.08125 at 999. Raises ValueError outside of 0..999.
    """
    if not 0 <= step < STEPS:
        raise ValueError(f"diffusion step {step}: 0 to {STEPS - 1}")
    ramp = np.linspace(-6.0, 6.0, STEPS)
    betas = (_LAST - _FIRST) / (1 + np.exp(-ramp)) + _FIRST
    return float(np.prod(1 - betas[: step + 1]))


def noised(image: Image.Image, step: int, wrap: bool, seed: int, name: str) -> Image.Image:
    """The RGB image under the forward diffusion of VCD and POVID (2311.16922, 2402.11411):

        x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,   a_t = prod_{s <= t} (1 - b_s),
        b_s = sigmoid(6 (2 s / 999 - 1)) (0.5e-2 - 1e-5) + 1e-5,   x_0 in [0, 1]

    clamped to [0, 1]; ``wrap`` lets values beyond run over in 8 bits, as POVID's released code does
    (about a third of the values of a mid-grey image at step 500). Drawn from seed and ``name``, the
    record's id: the same at every call.
    """
    draw = np.random.default_rng([seed, *name.encode()])
    kept = signal(step)
    clean = np.asarray(image, dtype=np.float64) / 255
    noisy = np.sqrt(kept) * clean + np.sqrt(1 - kept) * draw.standard_normal(clean.shape)
    if wrap:
        return Image.fromarray((np.trunc(noisy * 255).astype(np.int64) % 256).astype(np.uint8))
    return Image.fromarray(np.round(noisy.clip(0, 1) * 255).astype(np.uint8))


def _part(logps: TokenLogps, rows: slice) -> TokenLogps:
    """Some completions of it."""
    edited = logps.edited_CS
    return TokenLogps(
        logps_CS=logps.logps_CS[rows],
        mask_CS=logps.mask_CS[rows],
        entropy_CS=logps.entropy_CS[rows],
        top1_CS=logps.top1_CS[rows],
        mean_logit_CS=logps.mean_logit_CS[rows],
        edited_CS=None if edited is None else edited[rows],
    )
