"""Credit of PPO: rewards on tokens, generalised advantage estimation, whitening.

    r_t = - kl_coef * kl_t                                          at every token
          + score of each span whose last token is t
          + level at the last token                                 terms of the answer as a whole
    delta_t = scale * r_t + gamma * V_{t+1} - V_t                   V beyond the last token is 0
    A_t     = sum over l >= 0 of (gamma * lambda)^l * delta_{t+l}   (Schulman et al., 1506.02438)
    return_t = A_t + V_t
    A       <- (A - mean) / sqrt(var + 1e-8)                    over the batch's real tokens

kl_t is log pi - log ref of the sampled token in the policy that sampled it ("k1"), cut at 0 from
below ("clamped") or exp(d) - d - 1 with d = log ref - log pi ("k3", never negative). The defaults
are what LLaVA-RLHF's script ran (2309.14525): kl_coef 0.1 clamped, gamma and lambda 1, rewards
times 10 inside GAE, advantages whitened over the full batch, rewards not.

``as_released`` also repeats what its code does to padding: none is masked, so that the level lands
on the last column and padded columns have values, KL and a share in the whitening. Default is the
masked form, which does not depend on how wide the batch is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mlalign.credit._moments import Reduce, alone, moments
from mlalign.credit.spans import TokenSpans

Kl = Literal["k1", "clamped", "k3"]
_TINY = 1e-8
"""Added to a variance before its root."""


class Settings(BaseModel):
    """Settings of PPO's credit."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kl_coef: float = Field(default=0.1, ge=0)
    """Reward lost per nat of KL."""
    kl: Kl = "clamped"
    """Estimator of the KL of one token."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount of a reward per token."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """GAE's lambda; 1: no bootstrapping by the values."""
    reward_scale: float = Field(default=10.0, gt=0)
    """Multiplies the rewards (KL included) inside GAE."""
    whiten_advantages: bool = True
    as_released: bool = False
    """As the published code treats padding."""


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """What PPO's losses are given; 0 at padding unless ``as_released``."""

    rewards_RT: Tensor
    """Before their scale."""
    kl_RT: Tensor
    """Nats."""
    advantages_RT: Tensor
    returns_RT: Tensor
    metrics: dict[str, float]
    """Over the rows of this process."""


def ppo_credit(
    settings: Settings,
    *,
    level_R: Tensor,
    spans: TokenSpans,
    policy_RT: Tensor,
    reference_RT: Tensor,
    values_RT: Tensor,
    mask_RT: Tensor,
    reduce: Reduce = alone,
) -> Trajectories:
    """Rewards, advantages and returns of R completions, padded at the tail; no gradient.

    ``policy_RT``, ``reference_RT``: log-probs of the sampled tokens when they were sampled;
    ``values_RT``: V_t, the value before token t is written. In the dtype of the values. ``reduce``
    adds up over processes, for the whitening. A row without a token gets nothing.
    """
    seen_RT = torch.ones_like(mask_RT) if settings.as_released else mask_RT
    dtype = values_RT.dtype
    kl_RT = token_kl(policy_RT, reference_RT, settings.kl).to(dtype) * seen_RT
    scores_RT = placed(level_R, spans, seen_RT).to(dtype)
    rewards_RT = scores_RT - settings.kl_coef * kl_RT
    advantages_RT, returns_RT = gae(
        settings.reward_scale * rewards_RT,
        values_RT.detach(),
        seen_RT,
        gamma=settings.gamma,
        lam=settings.lam,
    )
    if settings.whiten_advantages:
        advantages_RT = whitened(advantages_RT, seen_RT, reduce=reduce)
    real = mask_RT.sum(1).clamp(min=1)
    metrics = {
        "objective/kl": (kl_RT * mask_RT).sum(1).mean().item(),
        "objective/non_score_reward": -settings.kl_coef * (kl_RT * mask_RT).sum(1).mean().item(),
        "objective/scores": scores_RT.sum(1).mean().item(),
        "objective/kl_per_token": ((kl_RT * mask_RT).sum(1) / real).mean().item(),
    }
    return Trajectories(
        rewards_RT=rewards_RT,
        kl_RT=kl_RT,
        advantages_RT=advantages_RT,
        returns_RT=returns_RT,
        metrics=metrics,
    )


def token_kl(policy_RT: Tensor, reference_RT: Tensor, kind: Kl = "k1") -> Tensor:
    """An estimate of the KL from each sampled token's two log-probs, in nats; no gradient."""
    d_RT = (policy_RT - reference_RT).detach()
    if kind == "clamped":
        return d_RT.clamp(min=0)
    return torch.exp(-d_RT) + d_RT - 1 if kind == "k3" else d_RT


def placed(level_R: Tensor, spans: TokenSpans, mask_RT: Tensor) -> Tensor:
    """Scores on tokens, (R, T) in float64: each span's on its last token, the level on the last
    token of the row. A row sums to its whole reward; one without a token has nothing."""
    on_RT = torch.zeros(mask_RT.shape, dtype=torch.float64)
    on_RT.index_put_((spans.row_J, spans.last_J), spans.score_J.double(), accumulate=True)
    mask = mask_RT.cpu()
    last_R = (mask.cumsum(1) * mask).argmax(1)
    row_R = torch.arange(len(mask))
    on_RT.index_put_((row_R, last_R), level_R.detach().double().cpu(), accumulate=True)
    return (on_RT * mask).to(mask_RT.device)


def gae(
    rewards_RT: Tensor, values_RT: Tensor, mask_RT: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (R, T) and 0 at padding, which must be at the tail."""
    rewards_RT, values_RT = rewards_RT * mask_RT, values_RT * mask_RT
    advantages_RT = torch.zeros_like(values_RT)
    later_R = torch.zeros_like(values_RT[:, 0])
    next_R = torch.zeros_like(later_R)
    for t in reversed(range(values_RT.shape[1])):
        later_R = rewards_RT[:, t] + gamma * next_R - values_RT[:, t] + gamma * lam * later_R
        advantages_RT[:, t] = later_R
        next_R = values_RT[:, t]
    return advantages_RT, advantages_RT + values_RT


def whitened(
    values_RT: Tensor, mask_RT: Tensor, *, shift_mean: bool = True, reduce: Reduce = alone
) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the real tokens of all processes, var with n - 1; 0 at
    padding. ``shift_mean=False``: the mean is put back, as rewards are whitened. Fewer than two
    tokens stay as they are."""
    found = moments(values_RT[mask_RT.bool()], reduce)
    if not found.n > 1:
        return values_RT * mask_RT
    mean = found.mean.to(values_RT)
    white_RT = (values_RT - mean) * torch.rsqrt(found.std.to(values_RT).square() + _TINY)
    return (white_RT if shift_mean else white_RT + mean) * mask_RT
