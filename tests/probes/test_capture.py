"""Activations are held once, and nothing stays on the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mlalign.capture import capture


class Pair(nn.Module):
    """A block that returns a tuple, as decoder blocks of older models do."""

    def forward(self, x_TD: Tensor) -> tuple[Tensor, str]:
        return x_TD + 1, "cache"


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_holds_outputs_inputs_and_the_first_of_a_tuple() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Pair())
    x_TD = torch.randn(5, 3)
    modules = {"in": model[0], "out": model[1]}
    with capture(modules, inputs={"in"}) as held:
        y, _ = model(x_TD)
    assert torch.equal(held["in"], x_TD) and torch.equal(held["out"], y)
    assert not held["out"].requires_grad
    assert hooks(model) == 0


def test_reduce_stands_in_for_the_tensor() -> None:
    model = nn.Linear(3, 4)
    with capture({"linear": model}, reduce=lambda name, t: (name, t.shape)) as held:
        model(torch.randn(5, 3))
    assert held == {"linear": ("linear", (5, 4))}


def test_output_is_untouched() -> None:
    model = nn.Linear(3, 4)
    x_TD = torch.randn(5, 3)
    before = model(x_TD)
    with capture({"a": model}), capture({"b": model}, inputs={"b"}):
        assert torch.equal(model(x_TD), before)


def test_a_second_call_raises_and_hooks_go() -> None:
    model = nn.Linear(3, 4)
    with pytest.raises(RuntimeError, match="linear fired twice"), capture({"linear": model}):
        model(torch.randn(5, 3))
        model(torch.randn(5, 3))
    assert hooks(model) == 0


def test_a_checkpointed_block_raises() -> None:
    model = nn.Linear(3, 3)
    x_TD = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="fired twice"), capture({"linear": model}):
        y = torch.utils.checkpoint.checkpoint(model, x_TD, use_reentrant=True)
        y.sum().backward()  # type: ignore[union-attr]
    assert hooks(model) == 0


def test_refuses_what_is_no_tensor_and_unknown_inputs() -> None:
    model = nn.Identity()
    with pytest.raises(TypeError, match="same gave str"), capture({"same": model}):
        model("text")
    with pytest.raises(ValueError, match="names no module: other"), capture({}, inputs={"other"}):
        pass
