"""Mean and standard deviation over the entries of several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Adds a small tensor up over the processes, and gives it back where it was, most often on the CPU.
Every process calls it equally often."""


def alone(tensor: Tensor) -> Tensor:
    """The reduction of a single process."""
    return tensor


class Moments(NamedTuple):
    """Of some entries, in float64."""

    mean: Tensor
    std: Tensor
    """With n - 1; NaN of fewer than two entries."""
    n: Tensor


def moments(values: Tensor, reduce: Reduce = alone) -> Moments:
    """Mean and standard deviation over all entries of all processes.

    Two reductions: squares are summed around the common mean, so that equal entries have a spread
    of exactly nothing.
    """
    flat = values.detach().double().flatten()
    n, total = reduce(torch.stack([flat.new_tensor(float(flat.numel())), flat.sum()]))
    mean = total / n
    squares = reduce((flat - mean).square().sum().reshape(1))[0]
    std = (squares / (n - 1)).sqrt() if n > 1 else squares.new_tensor(float("nan"))
    return Moments(mean=mean, std=std, n=n)
