"""A pass leaves nothing behind: modes, ``requires_grad`` and random states come back after it, and
the memory that it used goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from mlalign.models._vlm import VLM


@contextlib.contextmanager
def undisturbed(vlm: VLM) -> Iterator[None]:
    """Eval mode without gradients; modes, requires_grad and random states come back afterwards."""
    modes = [(module, module.training) for module in vlm.model.modules()]
    states = random.getstate(), np.random.get_state()
    devices = [vlm.device] if vlm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _grads_put_back(vlm.model):
        try:
            vlm.model.eval()
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient, inside."""
    with _grads_put_back(model):
        model.requires_grad_(False)
        yield


def hand_back_memory() -> None:
    """Give what was freed on the CPU back to the system, where the C library can (glibc).

    Steps and passes allocate other sizes, and the heap keeps what the one freed in pieces that the
    other cannot use: of 250 MB that a first pass of all probes left on microworld, this gave back
    156.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@contextlib.contextmanager
def _grads_put_back(model: nn.Module) -> Iterator[None]:
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, wanted in grads:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
