"""What every objective is asked: float64, the reference, swaps, padding and batch-mates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mlalign.branching.batch import ObjectiveOut, TokenLogps

Rows = list[list[float]]

POLICY = [[-1.0, -2.0, -0.5, -0.5], [-4.0, -1.0]]
"""Chosen and rejected of one pair, with the reference's below: log-ratios 2 over 4 tokens and -1
over 2."""
REFERENCE = [[-3.0, -2.0, -0.25, -0.75], [-3.5, -0.5]]

OTHERS = [[-0.1], [-2.0, -3.0, -1.0, -1.0, -0.2, -5.0], [-1.0, -0.3, -0.2], [-0.7]]
"""Two pairs of other lengths."""
OTHERS_REFERENCE = [[-0.9], [-1.0, -4.0, -1.5, -0.2, -0.2, -3.0], [-1.5, -0.1, -0.2], [-0.2]]


def logps(rows: Rows, pad: int = 0, junk: float = -9.0) -> TokenLogps:
    """Rows of unequal lengths, with junk under the padding: whoever forgets the mask counts it."""
    longest = max(map(len, rows)) + pad
    values = torch.tensor([[*row, *[junk] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[t < len(row) for t in range(longest)] for row in rows])
    zeros = torch.zeros_like(values)
    return TokenLogps(
        logps_CS=values, mask_CS=mask, entropy_CS=zeros, top1_CS=mask, mean_logit_CS=zeros
    )


def by_hand(objective: Any) -> ObjectiveOut:
    """The objective on the pair of POLICY and REFERENCE."""
    return objective(logps(POLICY), logps(REFERENCE))


def check_rewards(objective: Any, beta: float) -> None:
    """TRL's rewards: beta times the summed log-ratio."""
    out = by_hand(objective)
    assert out.chosen_rewards_N.item() == pytest.approx(2 * beta, abs=1e-6)
    assert out.rejected_rewards_N.item() == pytest.approx(-beta, abs=1e-6)
    assert out.margins_N.item() == pytest.approx(3 * beta, abs=1e-6)


def check_at_reference(objective: Any, expected: float) -> None:
    """The closed form, what the objective says it is, and no margin."""
    same = logps(POLICY + OTHERS)
    out = objective(same, same)
    assert objective.at_reference == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(
        out.per_pair_N, torch.full((3,), expected), atol=1e-6, rtol=1e-6, check_dtype=True
    )
    assert out.margins_N.tolist() == [0, 0, 0]


def check_swap(objective: Any) -> None:
    """Chosen and rejected swapped: the margin is negated, and the loss is another one."""
    out = objective(logps(POLICY), logps(REFERENCE))
    swapped = objective(logps(POLICY[::-1]), logps(REFERENCE[::-1]))
    assert out.margins_N.item() != 0
    assert swapped.margins_N.item() == pytest.approx(-out.margins_N.item())
    assert swapped.chosen_rewards_N.item() == out.rejected_rewards_N.item()
    assert swapped.per_pair_N.item() != pytest.approx(out.per_pair_N.item(), abs=1e-3)


def check_padding_and_mates(objective: Any) -> None:
    """The same loss, rewards and gradient alone, padded, and among pairs of other lengths."""
    alone, grad = _with_gradient(objective, POLICY, REFERENCE, 0)
    padded = _with_gradient(objective, POLICY, REFERENCE, 3)
    mates = _with_gradient(objective, POLICY + OTHERS, REFERENCE + OTHERS_REFERENCE, 1)
    behind = _with_gradient(objective, OTHERS + POLICY, OTHERS_REFERENCE + REFERENCE, 0)
    for (out, its_grad), pair in ((padded, 0), (mates, 0), (behind, 2)):
        for name in ("per_pair_N", "margins_N", "chosen_rewards_N", "rejected_rewards_N"):
            torch.testing.assert_close(getattr(out, name)[pair], getattr(alone, name)[0])
        of_pair = its_grad[2 * pair : 2 * pair + 2]
        torch.testing.assert_close(of_pair[:, : grad.shape[1]], grad)
        assert not of_pair[:, grad.shape[1] :].any(), "a gradient at padding"
    assert grad.any()


def check_float64(make: Callable[[float], Any], formula: Callable[..., Tensor]) -> None:
    """Fifty random batches of random lengths against ``formula`` in float64.

    ``formula(beta, policy, reference)`` takes lists of float64 vectors, one per completion, and
    returns a loss per pair.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 9, (8,), generator=generator).tolist()
        policy = [_draw(n, generator) for n in lengths]
        reference = [_draw(n, generator) for n in lengths]
        beta = float(torch.rand((), generator=generator)) + 0.05
        out = make(beta)(
            logps([v.tolist() for v in policy]), logps([v.tolist() for v in reference])
        )
        expected = formula(beta, policy, reference)
        torch.testing.assert_close(out.per_pair_N.double(), expected, atol=1e-5, rtol=1e-5)
        assert out.per_pair_N.dtype == torch.float32


def summed(policy: list[Tensor], reference: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Chosen and rejected log-ratios, added up one by one."""
    ratios = [float((p - r).sum()) for p, r in zip(policy, reference, strict=True)]
    both = torch.tensor(ratios, dtype=torch.float64)
    return both[0::2], both[1::2]


def averaged(policy: list[Tensor], reference: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same, as means over the tokens."""
    ratios = [float((p - r).mean()) for p, r in zip(policy, reference, strict=True)]
    both = torch.tensor(ratios, dtype=torch.float64)
    return both[0::2], both[1::2]


def nll(policy: list[Tensor]) -> Tensor:
    """Mean negative log-prob of each chosen completion."""
    return torch.tensor([-float(p.mean()) for p in policy[0::2]], dtype=torch.float64)


def softplus(value: Tensor) -> Tensor:
    """log(1 + e^x), in the dtype given: -log sigmoid(-x)."""
    return torch.log1p(torch.exp(value))


def _draw(length: int, generator: torch.Generator) -> Tensor:
    return -3 * torch.rand(length, generator=generator, dtype=torch.float64)


def _with_gradient(
    objective: Any, policy: Rows, reference: Rows, pad: int
) -> tuple[ObjectiveOut, Tensor]:
    made = logps(policy, pad)
    made.logps_CS.requires_grad_()
    out = objective(made, logps(reference, pad))
    out.per_pair_N.sum().backward()
    assert not out.margins_N.requires_grad and made.logps_CS.grad is not None
    return out, made.logps_CS.grad
