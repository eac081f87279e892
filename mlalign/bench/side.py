"""One side of a comparison of training steps, and how far two sides are apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Side:
    """One side, ready to step."""

    model: Any

    def step(self) -> float:
        """One step up to gradients, the optimiser left out; the loss."""
        raise NotImplementedError

    def logps(self) -> dict[Any, Tensor]:
        """Completion -> per-token log-probs of the policy; the same keys on every side."""
        raise NotImplementedError

    def gradients(self) -> dict[str, Tensor]:
        """LoRA gradients of the last step."""
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}


def compare(ours: Side, other: Side) -> dict[str, float]:
    """How far two sides are apart: loss, per-token log-probs, LoRA gradients (relative to the norm
    of each weight's; the worst weight).

    Raises ValueError where the sides do not hold the same completions or weights.
    """
    losses, grads = [], []
    for side in (ours, other):
        losses.append(side.step())
        grads.append({n: g.clone() for n, g in side.gradients().items()})
    mine, theirs = ours.logps(), other.logps()
    if mine.keys() != theirs.keys() or grads[0].keys() != grads[1].keys():
        raise ValueError("bench: the sides do not hold the same records or weights")
    apart = [(grads[0][n] - g).norm() / g.norm() for n, g in grads[1].items() if g.norm() > 0]
    if not apart:
        raise ValueError("bench: the opponent's step has no gradient: nothing can be compared")
    return {
        "loss_max_abs_diff": abs(losses[0] - losses[1]),
        "logps_max_abs_diff": max(
            float((mine[key] - value).abs().max()) if mine[key].shape == value.shape else math.inf
            for key, value in theirs.items()
        ),
        "grad_rel_diff": float(max(apart)),
    }


def steps(made: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What ``rounds.alternate`` calls."""
    return {name: partial(type(side).step, side) for name, side in made.items()}


def plant(model: torch.nn.Module) -> None:
    """A non-zero adapter, the same for the same names: a fresh one makes any layout agree."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            # Margins of a few nats. Larger ones say nothing more, and the loss then shows how
            # float32 rounds sums (400 log-probs of -10 are -4,000 +- 2e-4), not the layouts.
            std = 0.005 if "lora_B" in name else 0.1
            drawn = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.copy_(drawn.to(parameter))
