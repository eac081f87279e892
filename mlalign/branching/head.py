"""Log-probs without logits: the head at completion positions only, a tile of tokens at a time.

    log p(y | h) = w_y h - logsumexp_v(w_v h)

Hidden states are gathered where a completion token is predicted, projected tile by tile, and each
tile is reduced in float32 before the next is made, so that nothing of size tokens x vocabulary is
ever kept. The gradient with respect to h is known as soon as the tile is,

    d log p / d h = w_y - sum_v p_v w_v,

a vector of the model's width for each token: with a frozen head it is kept from the forward pass
and only scaled in the backward pass, which costs one product less than projecting again. A head
that trains is projected again in the backward pass, for the gradient of its weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TILE = 2**23
"""Logits (tokens x vocabulary) of one tile: 32 MiB in float32."""


def tile_tokens(vocabulary: int) -> int:
    """Tokens per tile."""
    return max(1, TILE // vocabulary)


class _Head(torch.autograd.Function):
    """(hidden (M, D), weight (V, D), bias (V) or None, target (M), temperature) -> logps (M),
    stats (M, 3)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_M: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        keeps = wants_hidden and not wants_weight
        ctx.temperature = temperature
        logps, stats, slopes = [], [], []
        step = tile_tokens(len(weight_VD))
        for h, target in zip(hidden_MD.split(step), target_M.split(step), strict=True):
            logits = _logits(h, weight_VD, bias_V, temperature)
            mean = logits.mean(-1)
            top = logits.argmax(-1) == target
            logsum = logits.logsumexp(-1, keepdim=True)
            logits -= logsum
            logps.append(logits.gather(-1, target[:, None])[:, 0])
            p = logits.exp()
            logits *= p
            stats.append(torch.stack([-logits.nansum(-1), top.float(), mean], -1))
            if keeps:
                slopes.append(_slope(p, weight_VD, target))
        ctx.kept = keeps
        if keeps:
            ctx.save_for_backward(torch.cat(slopes) if slopes else hidden_MD)
        elif wants_weight:
            ctx.save_for_backward(hidden_MD, weight_VD, bias_V, target_M)
        out = torch.cat(logps), torch.cat(stats)
        ctx.mark_non_differentiable(out[1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The logits are divided by the temperature, and so is what comes back through them.
        grad_M = grads[0] / ctx.temperature
        if ctx.kept:
            (slope_MD,) = ctx.saved_tensors
            return (grad_M[:, None] * slope_MD).to(slope_MD.dtype), None, None, None, None
        hidden_MD, weight_VD, bias_V, target_M = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden_MD)
        to_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        to_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        step = tile_tokens(len(weight_VD))
        for start in range(0, len(hidden_MD), step):
            part = slice(start, start + step)
            h, grad = hidden_MD[part], grad_M[part, None]
            slope = -_logits(h, weight_VD, bias_V, ctx.temperature).softmax(-1)
            slope.scatter_add_(1, target_M[part, None], torch.ones_like(grad))
            slope *= grad
            if to_bias is not None:
                to_bias += slope.sum(0)
            slope = slope.to(weight_VD.dtype)
            to_hidden[part] = slope @ weight_VD
            to_weight += (slope.T @ h).float()
        bias = None if to_bias is None or bias_V is None else to_bias.to(bias_V.dtype)
        return to_hidden, to_weight.to(weight_VD.dtype), bias, None, None


def _logits(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float
) -> Tensor:
    """(M, V) float32, divided by the temperature."""
    logits = nn.functional.linear(hidden_MD, weight_VD, bias_V).float()
    return logits if temperature == 1 else logits / temperature


def _slope(p_MV: Tensor, weight_VD: Tensor, target_M: Tensor) -> Tensor:
    """d log p(target) / d hidden, (M, D); ``p_MV`` is used up."""
    p_MV.neg_()
    p_MV.scatter_add_(1, target_M[:, None], torch.ones_like(target_M[:, None], dtype=p_MV.dtype))
    return p_MV.to(weight_VD.dtype) @ weight_VD


def project(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_M: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """(M, 4) float32: log-prob of the target (with gradient), entropy in nats, 1 where the target
    is the argmax, mean logit; all of logits that are divided by ``temperature``."""
    logps_M, stats_M3 = _Head.apply(  # type: ignore[misc]
        hidden_MD, weight_VD, bias_V, target_M, temperature
    )
    return torch.cat([logps_M[:, None], stats_M3], -1)


@contextlib.contextmanager
def heads_replaced(head: nn.Module, forward: Any) -> Iterator[None]:
    """Inside, the head's linears compute ``forward(linear, hidden)`` in their own place.

    The module is still called as itself, so that hooks run: ZeRO-3 gathers its weight, and PEFT
    chooses between a trained copy and the original.
    """
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise TypeError(f"the output head is a {type(head).__name__}: only a linear one is served")
    own = [m.__dict__.get("forward") for m in linears]
    for linear in linears:
        setattr(linear, "forward", partial(forward, linear))  # noqa: B010
    try:
        yield
    finally:
        for linear, before in zip(linears, own, strict=True):
            if before is None:
                del linear.__dict__["forward"]
            else:
                setattr(linear, "forward", before)  # noqa: B010
