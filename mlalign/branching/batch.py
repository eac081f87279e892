"""The types that pass between data, model, objective and probe, and the legend of shape letters.

Suffix letters on tensor names: R rows, G groups (one prefix and its completions; a row holds one,
or several where rows are packed), T tokens of a row, C completions (all groups, in the order in
which they were given), S tokens of the longest completion, K completions of one group, N pairs,
V vocabulary, D width, L layers, H heads, P image tokens of one image, A rows of positions, M real
completion tokens of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

PADDING = -1
"""Segment number of a padded token."""
PREFIX = 0
"""Segment number of the prefix; completions of a row are 1..K."""


class Group(NamedTuple):
    """Where one prefix and its completions stand in a row."""

    start: int
    """First position of the prefix."""
    stops: tuple[int, ...]
    """Where the prefix ends, then where each completion ends (exclusive)."""


class ImageView(NamedTuple):
    """A further look at every pair that an objective asks for (its ``views``)."""

    name: str
    """Under which the objective finds it in ``TokenLogps.views``."""
    image: Literal["crop", "noise", "blank", "record"]
    """What takes the image's place; "record": the record's own ``rejected_image``."""
    scores: Literal["chosen", "argmax"] = "chosen"
    """chosen: the chosen answer, seeing the changed image. argmax: what the model would say in its
    place, seeing the changed image (the likeliest token at each position of the chosen answer);
    those tokens are then scored with the true image."""
    whose: Literal["own", "policy"] = "own"
    """With argmax: whether the reference scores its own likeliest tokens or the policy's."""
    settings: tuple[tuple[str, float], ...] = ()
    """Of the change, by name: area_min, area_max, step, wrap."""


@dataclass(frozen=True, kw_only=True)
class PrefixBatch:
    """Rows of a prefix and its completions: ``[prefix | completion 1 | ... | padding]``.

    Packed rows hold several such groups, one after the other; no group sees another.
    """

    input_ids_RT: Tensor
    """int64; image tokens expanded, padded at the tail with the tokenizer's pad id."""
    position_ids: Tensor
    """int64, (R, T), or (A, R, T) for M-RoPE; each completion continues from the prefix's largest
    position + 1, in every row of positions."""
    segment_RT: Tensor
    """int64; PADDING, PREFIX or the completion's number in its group."""
    group_RT: Tensor
    """int64; number of the group in its row, PADDING at padding."""
    place_RT: Tensor
    """int64; index of the token in its own [prefix | completion]. Sliding windows count these."""
    groups_R: tuple[tuple[Group, ...], ...]
    """The groups of each row."""
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
    images: dict[str, Tensor] = field(default_factory=dict)
    """Inputs of the vision tower for the different images of the batch, each once."""
    image_G: tuple[int, ...] = ()
    """Which of these images each group looks at; groups by row, then by place in the row."""
    features: Any = None
    """Projected image features as the model takes them (``mm_encoder_outputs["image"]``), one
    image per group; None until ``VLM.encode``."""
    block_RT: Tensor | None = None
    """int64; tokens of one image block attend to each other both ways (Gemma 3); -1 elsewhere."""
    windows: tuple[tuple[str, int | None], ...] = ()
    """(layer type, sliding window or None) where masks differ by layer type. A lone ("", window)
    is one mask for all layers; empty: no window."""
    ids_C: tuple[str, ...] = ()
    """Record id of each completion."""
    sides_C: tuple[str, ...] = ()
    """"chosen" or "rejected", or a number as text; of a view, its name and settings."""
    edited_CS: Tensor | None = None
    """float32; weight of the record's segment that each completion token belongs to, 0 outside of
    them; None where nobody asked."""
    views: tuple[str, ...] = ()
    """Views behind the pairs: after 2N completions, chosen and rejected by turns, N of each."""
    aside: dict[str, PrefixBatch] = field(default_factory=dict)
    """Batches of N chosen answers with a changed image, by the view's name: their likeliest tokens
    become a view of this batch (``views.with_targets``)."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PrefixBatch:
        """The same batch on another device (accelerate calls this by name)."""

        def moved(value: Any) -> Any:
            if isinstance(value, (Tensor, PrefixBatch)):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, dict):
                return {key: moved(each) for key, each in value.items()}
            return value

        return PrefixBatch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    @property
    def num_pairs(self) -> int:
        """Pairs in the batch: its completions are chosen and rejected by turns, then views."""
        return len(self.row_C) // (2 + len(self.views))

    @property
    def pair_ids(self) -> tuple[str, ...]:
        """Record id of each pair."""
        return self.ids_C[0 : 2 * self.num_pairs : 2]


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
    edited_CS: Tensor | None = None
    """float32; as in the batch: weight of the record's segment, 0 outside of segments."""
    views: dict[str, TokenLogps] = field(default_factory=dict)
    """(N, S) each: one completion per pair, as the objective's ``views`` ask."""

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
    neuron: int = -1
    """Neuron of the layer's MLP (row of W_down) from 0, or -1."""
    group: str = ""
    """Token group ("image", "prompt", "response"), word ("real", "absent") or module name."""
    value: float = float("nan")
    noise: float = float("nan")
    """The same number read from the same model twice (its floor), where that is defined."""
    lo: float = float("nan")
    hi: float = float("nan")
    """95 % bootstrap interval over records, where the value is over the whole set."""
    n: int = 1
    """How many tokens, words or records the value is the mean of."""
