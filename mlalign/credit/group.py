"""Credit of group methods: G groups of K completions of one prompt each, no value model.

Sequence advantages, of the reward R_i of completion i in its group:

    GRPO (2402.03300)   A_i = (R_i - mean) / (std + 1e-4)               scale: group
                        A_i = R_i - mean                                scale: none (Dr. GRPO)
                        std over the whole batch in its place           scale: batch
    RLOO (2402.14740)   A_i = R_i - mean of the others                  baseline: leave_one_out
                        (A - mean) / (std + 1e-4) over the batch        with scale: batch

std with n - 1, as TRL computes all of them. Equal rewards in a group give exactly 0, and are
counted.

``form: spans`` adds the credit of spans (claims, sentences, mentions):

    A_t = A_seq + strength * (z_t - m)
    z_t = score of the span that token t is in / (std of the span scores of its group + 1e-4)
          0 outside of spans; spans of several terms add up
    m   = mean of z over the tokens of the completion

The span term of every completion sums to zero over its tokens: neither more claims nor more words
gain anything, they only move credit from word to word. ``strength`` 0, or one span over the whole
completion, is the plain advantage. Terms of the answer as a whole enter A_seq only. Where the span
scores of a group do not differ, their std over the batch takes its place (counted); where those do
not differ either, there is no span term (counted).

``form: process`` is DeepSeekMath's process supervision (2402.03300, section 4.1.3):

    A_t = sum of (r_j - mean) / (std + 1e-4) over the steps j that end at t or later, + A_level

mean and std over all steps (spans) of the group; A_level is the sequence advantage of the terms
without spans. Unlike ``spans``, it pays for more steps where they are better than the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from mlalign.credit._moments import Reduce, alone, moments
from mlalign.credit.spans import TokenSpans

EPSILON = 1e-4
"""Added to every standard deviation, as TRL does."""
FLAT = 1e-6
"""Standard deviation, relative to the largest size, up to which values do not differ."""


class Settings(BaseModel):
    """Settings of a group's credit."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    form: Literal["sequence", "spans", "process"] = "spans"
    """sequence: every token the same; see the head of this file for the others."""
    strength: float = Field(default=1.0, ge=0)
    """Of the span term (lambda)."""
    baseline: Literal["group", "leave_one_out"] = "group"
    scale: Literal["group", "batch", "none"] = "group"

    @model_validator(mode="after")
    def _published(self) -> Settings:
        if self.baseline == "leave_one_out" and self.scale == "group":
            raise ValueError("baseline leave_one_out (RLOO) is scaled by the batch or not at all")
        return self


@dataclass(frozen=True, kw_only=True)
class Credit:
    """What the loss is given."""

    advantages_RT: Tensor
    """Float32; 0 at padding."""
    sequence_R: Tensor
    """Float32; the advantage of the whole completion (of its terms without spans, in
    ``process``)."""
    metrics: dict[str, float]
    """Shares of groups of this process, TRL's name where it has one."""


def group_credit(
    settings: Settings,
    *,
    total_R: Tensor,
    level_R: Tensor,
    spans: TokenSpans,
    mask_RT: Tensor,
    group_size: int,
    reduce: Reduce = alone,
) -> Credit:
    """Advantages of R completions, groups one after the other and whole on this process.

    ``total_R``: reward of each; ``level_R``: the part of it that no span carries. ``reduce`` adds
    up over processes, for what is taken over the batch; every process must call this equally often.
    Raises ValueError for rows that make no whole groups and rewards that are no finite numbers.
    """
    process = settings.form == "process"
    rewards_R = (level_R if process else total_R).double()
    sequence_R = sequence_advantages(
        rewards_R, group_size, baseline=settings.baseline, scale=settings.scale, reduce=reduce
    ).to(mask_RT.device)
    mask = mask_RT.double()
    advantages = sequence_R.unsqueeze(1) * mask
    equal_G = equal_groups(total_R, group_size)
    metrics = {"frac_reward_zero_std": equal_G.double().mean().item()}
    if process:
        term_RT, flat_G = step_advantages(spans, mask_RT, group_size)
        advantages = advantages + term_RT
        metrics["credit/flat_groups"] = flat_G.double().mean().item()
    elif settings.form == "spans":
        term_RT, borrowed_G, flat_G = span_term(spans, mask_RT, group_size, reduce)
        advantages = advantages + settings.strength * term_RT
        metrics["credit/borrowed_std_groups"] = borrowed_G.double().mean().item()
        metrics["credit/flat_groups"] = flat_G.double().mean().item()
    if settings.form != "sequence":
        size = (advantages - sequence_R.unsqueeze(1) * mask).abs().sum() / mask.sum().clamp(min=1)
        metrics["credit/span_term"] = size.item()
    return Credit(advantages_RT=advantages.float(), sequence_R=sequence_R.float(), metrics=metrics)


def sequence_advantages(
    rewards_R: Tensor,
    group_size: int,
    *,
    baseline: Literal["group", "leave_one_out"] = "group",
    scale: Literal["group", "batch", "none"] = "group",
    reduce: Reduce = alone,
) -> Tensor:
    """Advantages (R,) in float64; exactly 0 in a group of equal rewards.

    Raises ValueError for rows that make no whole groups, groups of fewer than two, and rewards that
    are no finite numbers.
    """
    rewards_GK = _grouped(rewards_R.detach().double(), group_size)
    if not torch.isfinite(rewards_GK).all():
        row = int((~torch.isfinite(rewards_R)).nonzero()[0])
        raise ValueError(f"row {row}: a reward of {float(rewards_R[row])}. Mend the reward")
    mean_G1 = rewards_GK.mean(1, keepdim=True)
    equal_G = equal_groups(rewards_R, group_size)
    centred_GK = (rewards_GK - mean_G1).masked_fill(equal_G[:, None], 0.0)
    if baseline == "leave_one_out":
        centred_GK = centred_GK * (group_size / (group_size - 1))
        if scale == "batch":
            # Of the advantages: their mean over whole groups is 0.
            centred_GK = centred_GK / (moments(centred_GK, reduce).std + EPSILON)
    elif scale == "batch":
        centred_GK = centred_GK / (moments(rewards_GK, reduce).std + EPSILON)
    elif scale == "group":
        centred_GK = centred_GK / (rewards_GK.std(1, keepdim=True) + EPSILON)
    return centred_GK.flatten()


def equal_groups(rewards_R: Tensor, group_size: int) -> Tensor:
    """Whether the rewards of each group do not differ, (G,) bool."""
    rewards_GK = _grouped(rewards_R.detach().double(), group_size)
    return rewards_GK.std(1) <= FLAT * rewards_GK.abs().amax(1).clamp(min=1.0)


def span_term(
    spans: TokenSpans, mask_RT: Tensor, group_size: int, reduce: Reduce = alone
) -> tuple[Tensor, Tensor, Tensor]:
    """(z - m of each token (R, T) in float64, groups that borrow the batch's std (G,) bool, groups
    with spans that get no term (G,) bool)."""
    rows = len(mask_RT)
    std_G, flat_G, any_G = _spread(spans, rows, group_size)
    over_batch = moments(spans.score_J, reduce)
    # NaN (fewer than two spans in the batch) is flat as well.
    batch_flat = not bool(over_batch.std > FLAT * over_batch.mean.abs().clamp(min=1.0))
    std_G = torch.where(flat_G, over_batch.std, std_G)
    scale_G = 1 / (std_G + EPSILON)
    if batch_flat:
        scale_G = scale_G.masked_fill(flat_G, 0.0)
    mask = mask_RT.double().cpu()
    z_RT = spans.score_RT * scale_G.repeat_interleave(group_size)[:, None] * mask
    m_R1 = z_RT.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    term_RT = ((z_RT - m_R1) * mask).to(mask_RT.device)
    alone_G = flat_G & any_G
    return term_RT, alone_G & (not batch_flat), alone_G & batch_flat


def step_advantages(spans: TokenSpans, mask_RT: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(sum of the normalised scores of the steps that end at each token or later, (R, T) in
    float64; groups with steps whose scores do not differ, (G,) bool: those get 0)."""
    rows = len(mask_RT)
    std_G, flat_G, any_G = _spread(spans, rows, group_size)
    group_J = spans.row_J // group_size
    count_G = torch.bincount(group_J, minlength=rows // group_size).clamp(min=1)
    mean_G = _sums(spans.score_J, group_J, rows // group_size) / count_G
    worth_J = (spans.score_J - mean_G[group_J]) / (std_G[group_J] + EPSILON)
    worth_J = worth_J.masked_fill(flat_G[group_J], 0.0)
    ends_RT = torch.zeros(mask_RT.shape, dtype=torch.float64)
    ends_RT.index_put_((spans.row_J, spans.last_J), worth_J, accumulate=True)
    later_RT = ends_RT.flip(1).cumsum(1).flip(1)
    return later_RT.to(mask_RT.device) * mask_RT.double(), flat_G & any_G


def _spread(spans: TokenSpans, rows: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(std of the span scores of each group, whether they do not differ, whether there are any)."""
    groups = rows // group_size
    group_J = spans.row_J // group_size
    count_G = torch.bincount(group_J, minlength=groups)
    mean_G = _sums(spans.score_J, group_J, groups) / count_G.clamp(min=1)
    squares_G = _sums((spans.score_J - mean_G[group_J]).square(), group_J, groups)
    std_G = (squares_G / (count_G - 1).clamp(min=1)).sqrt()
    largest_G = torch.zeros(groups, dtype=torch.float64).scatter_reduce(
        0, group_J, spans.score_J.abs(), "amax"
    )
    return std_G, std_G <= FLAT * largest_G.clamp(min=1.0), count_G > 0


def _sums(values_J: Tensor, group_J: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=torch.float64).index_add(0, group_J, values_J)


def _grouped(values_R: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(f"a group of {group_size}: it needs two completions or more to compare")
    if len(values_R) % group_size:
        raise ValueError(
            f"{len(values_R)} rows are no whole groups of {group_size}: keep the completions of a "
            "prompt on one process, one after the other"
        )
    return values_R.view(-1, group_size)
