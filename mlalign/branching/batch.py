"""The types that pass between data, model, objective and probe, and the legend of shape letters.

Suffix letters on tensor names: R rows (one prefix each), T tokens of a row, C completions (all
rows, in row order), S tokens of the longest completion, K completions of one row, N pairs,
V vocabulary, D width, L layers, H heads, P image tokens of one image.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

PADDING = -1
"""Segment number of a padded token."""
PREFIX = 0
"""Segment number of the prefix; completions of a row are 1..K."""


@dataclass(frozen=True, kw_only=True)
class PrefixBatch:
    """Rows of one prefix and its completions: ``[prefix | completion 1 | ... | pad]``."""

    input_ids_RT: Tensor
    """int64; image tokens expanded, padded at the tail with the tokenizer's pad id."""
    position_ids_RT: Tensor
    """int64; each completion continues from the last prefix position + 1."""
    segment_RT: Tensor
    """int64; PADDING, PREFIX or the completion's number in its row."""
    pixel_values: Tensor
    """float, one image per row in row order: (R, 3, height, width) for LLaVA."""
    row_C: Tensor
    """int64; the row that each completion stands in."""
    source_CS: Tensor
    """int64; the position (in its row) whose hidden state predicts each completion token. Padded
    with 0. The first token of every completion is predicted by the last prefix position."""
    target_CS: Tensor
    """int64; the token ids to be predicted; padded with 0."""
    mask_CS: Tensor
    """bool; True at real completion tokens."""
    last_C: Tensor
    """int64; the position (in its row) of each completion's last token."""
    ids_C: tuple[str, ...] = ()
    """Record id of each completion."""
    sides_C: tuple[str, ...] = ()
    """"chosen" or "rejected", or a number as text."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PrefixBatch:
        """The same batch on another device (accelerate calls this by name)."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            if isinstance(value := getattr(self, f.name), Tensor)
            else value
            for f in fields(self)
        }
        return PrefixBatch(**moved)

    @property
    def num_pairs(self) -> int:
        """Pairs in the batch, where its completions are chosen and rejected by turns."""
        return len(self.row_C) // 2


@dataclass(frozen=True, kw_only=True)
class TokenLogps:
    """What a forward pass says of each completion token. All float32."""

    logps_CS: Tensor
    """log p(token | prefix, earlier completion tokens); 0 at padding."""
    mask_CS: Tensor
    """bool; True at real tokens."""
    entropy_CS: Tensor
    """Entropy in nats of the distribution at each token; 0 at padding; no gradient."""
    top1_CS: Tensor
    """bool; the token is the argmax; False at padding."""
    mean_logit_CS: Tensor
    """Mean logit over the vocabulary (TRL's logits/* metrics); no gradient."""

    def sum_C(self) -> Tensor:
        """Log-prob of each completion: the sum over its tokens."""
        return (self.logps_CS * self.mask_CS).sum(-1)

    def lengths_C(self) -> Tensor:
        """Tokens of each completion, int64."""
        return self.mask_CS.sum(-1)


@dataclass(frozen=True, kw_only=True)
class ObjectiveOut:
    """What an objective returns. ``per_pair_N`` carries the gradient; the trainer scales it."""

    per_pair_N: Tensor
    """float32; the loss of each pair."""
    margins_N: Tensor
    """float32, no gradient; chosen minus rejected reward (beta times the log-ratio difference)."""
    chosen_rewards_N: Tensor
    """float32, no gradient; beta times the chosen log-ratio."""
    rejected_rewards_N: Tensor
    """float32, no gradient; beta times the rejected log-ratio."""
    metrics: dict[str, Any]
    """Further scalars, by metric name; means over the pairs of the batch."""


@dataclass(frozen=True, kw_only=True)
class ProbeReading:
    """One number that a probe read."""

    step: int
    """Optimiser steps taken."""
    probe: str
    """File name of the probe."""
    metric: str
    """What was read, e.g. "image_mass"; its unit and range stand in the probe's file."""
    side: str
    """"base" (adapter off), "adapted" (on), or "delta" (between them)."""
    record: str
    """Record id, or "" where the number is over the whole probe set."""
    layer: int = -1
    """Decoder layer from 0, or -1."""
    head: int = -1
    """Attention head from 0, or -1."""
    group: str = ""
    """Token group ("image", "prompt", "response"), word ("real", "absent") or module name."""
    value: float = float("nan")
    noise: float = float("nan")
    """The same number read from the same model twice (its floor), where that is defined."""
    n: int = 1
    """How many tokens, words or records the value is the mean of."""
