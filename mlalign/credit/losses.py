"""PPO's clipped losses (Schulman et al., 1707.06347), on per-token advantages.

    policy  max(-A_t * w_t, -A_t * clip(w_t, 1 - low, 1 + high)),  w_t = pi(t) / pi_old(t)
    value   1/2 max((V_t - return_t)^2, (clip(V_t, V_old - c, V_old + c) - return_t)^2)

Reduced over real tokens only, in one of two ways:

    tokens      sum over tokens / ``count``, the real tokens of the whole optimiser step (over
                micro-batches and processes) where it is given, else of this batch: PPO, DAPO, BNPO
    sequences   mean over rows of the mean over their tokens: GRPO as TRL's loss_type "grpo";
    ``count``
                is then the rows of the whole step. A row without a token counts and adds 0.

Losses of micro-batches add up to the step's where ``count`` is given.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Reduction = Literal["tokens", "sequences"]


class PolicyLoss(NamedTuple):
    """A scalar with gradient, and what is logged; without gradient, means over real tokens."""

    loss: Tensor
    clipped: Tensor
    """Share of tokens whose gradient the clip cuts off."""
    ratio: Tensor
    approx_kl: Tensor
    """Half the mean square of log w, in nats."""


class ValueLoss(NamedTuple):
    """A scalar with gradient, and the share of tokens whose clipped error is the larger."""

    loss: Tensor
    clipped: Tensor


def policy_loss(
    policy_RT: Tensor,
    old_RT: Tensor,
    advantages_RT: Tensor,
    mask_RT: Tensor,
    *,
    low: float = 0.2,
    high: float | None = None,
    reduction: Reduction = "tokens",
    count: Tensor | float | None = None,
) -> PolicyLoss:
    """``policy_RT`` (with gradient), ``old_RT``: log-probs of the sampled tokens. ``high``: None is
    ``low``. Raises ValueError for shapes that differ: advantages are per token."""
    _alike(policy_RT, old_RT=old_RT, advantages_RT=advantages_RT, mask_RT=mask_RT)
    # Whatever stands at padding must not become inf * 0.
    log_w_RT = (policy_RT - old_RT.detach()).masked_fill(~mask_RT.bool(), 0.0)
    w_RT = log_w_RT.exp()
    advantages_RT = advantages_RT.detach().to(w_RT.dtype)
    free_RT = -advantages_RT * w_RT
    held_RT = -advantages_RT * w_RT.clamp(1 - low, 1 + (low if high is None else high))
    with torch.no_grad():
        clipped = masked_mean((held_RT > free_RT).to(w_RT.dtype), mask_RT)
        ratio, kl = masked_mean(w_RT, mask_RT), masked_mean(0.5 * log_w_RT.square(), mask_RT)
    loss = reduced(torch.maximum(free_RT, held_RT), mask_RT, reduction, count)
    return PolicyLoss(loss=loss, clipped=clipped, ratio=ratio, approx_kl=kl)


def value_loss(
    values_RT: Tensor,
    old_RT: Tensor,
    returns_RT: Tensor,
    mask_RT: Tensor,
    *,
    clip: float = 0.2,
    reduction: Reduction = "tokens",
    count: Tensor | float | None = None,
) -> ValueLoss:
    """``values_RT`` (with gradient), ``old_RT``: V when the completions were sampled. Not yet
    multiplied by its coefficient. Raises ValueError for shapes that differ."""
    _alike(values_RT, old_RT=old_RT, returns_RT=returns_RT, mask_RT=mask_RT)
    old_RT, returns_RT = old_RT.detach(), returns_RT.detach()
    held_RT = torch.minimum(torch.maximum(values_RT, old_RT - clip), old_RT + clip)
    free_RT, held_RT = (values_RT - returns_RT).square(), (held_RT - returns_RT).square()
    with torch.no_grad():
        clipped = masked_mean((held_RT > free_RT).to(values_RT.dtype), mask_RT)
    loss = reduced(0.5 * torch.maximum(free_RT, held_RT), mask_RT, reduction, count)
    return ValueLoss(loss=loss, clipped=clipped)


def reduced(
    per_token_RT: Tensor,
    mask_RT: Tensor,
    reduction: Reduction,
    count: Tensor | float | None = None,
) -> Tensor:
    """A scalar; see the head of this file. 0 where nothing is real."""
    kept_RT = per_token_RT.masked_fill(~mask_RT.bool(), 0.0)
    tokens_R = mask_RT.sum(1).clamp(min=1)
    if reduction == "tokens":
        summed = kept_RT.sum()
        whole = mask_RT.sum().clamp(min=1) if count is None else count
    else:
        summed = (kept_RT.sum(1) / tokens_R).sum()
        whole = len(mask_RT) if count is None else count
    return summed / whole


def masked_mean(values_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """Mean over real tokens; 0 where there are none."""
    return values_RT.masked_fill(~mask_RT.bool(), 0.0).sum() / mask_RT.sum().clamp(min=1)


def _alike(first: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(other.shape)}, not {tuple(first.shape)}: one number for "
                "each token (an advantage of a whole completion is expanded first)"
            )
