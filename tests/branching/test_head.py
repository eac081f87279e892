"""Log-probs without logits, against float64 log-softmax and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mlalign.branching import head


def planted(tokens: int, width: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    bias = torch.randn(vocabulary, generator=generator)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight, bias, target


@pytest.mark.parametrize("trains", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("has_bias", [False, True])
@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 60),
    tile=st.sampled_from([1, 97, 999]),
    temperature=st.sampled_from([1.0, 0.5, 0.7, 2.0]),
)
def test_values_and_gradients(
    tokens: int, vocabulary: int, tile: int, temperature: float, trains: bool, has_bias: bool
) -> None:
    parts = planted(tokens, 8, vocabulary)
    hidden, weight, bias, target = parts
    chosen = bias if has_bias else None
    for tensor in (hidden, *((weight, bias) if trains else ())):
        tensor.requires_grad_()
    before, head.TILE = head.TILE, tile
    try:
        found = head.project(hidden, weight, chosen, target, temperature)
        scale = torch.linspace(-1, 2, tokens)
        (found[:, 0] * scale).sum().backward()
    finally:
        head.TILE = before

    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = nn.functional.linear(exact[0], exact[1], exact[2] if has_bias else None)
    logits = logits / temperature
    logps = logits.log_softmax(-1)
    picked = logps.gather(1, target[:, None])[:, 0]
    (picked * scale.double()).sum().backward()
    entropy = -(logps.exp() * logps).sum(-1)
    torch.testing.assert_close(found[:, 0].double(), picked, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 1].double(), entropy, atol=2e-5, rtol=1e-5)
    assert found[:, 2].bool().equal(logits.argmax(-1) == target)
    torch.testing.assert_close(found[:, 3].double(), logits.mean(-1), atol=1e-5, rtol=1e-5)
    assert hidden.grad is not None and exact[0].grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, atol=1e-5, rtol=1e-4)
    if trains:
        assert weight.grad is not None and exact[1].grad is not None
        torch.testing.assert_close(weight.grad.double(), exact[1].grad, atol=1e-5, rtol=1e-4)
    if trains and has_bias:
        assert bias.grad is not None and exact[2].grad is not None
        torch.testing.assert_close(bias.grad.double(), exact[2].grad, atol=1e-5, rtol=1e-4)


def test_nothing_of_size_tokens_times_vocabulary_is_kept() -> None:
    hidden, weight, _, target = planted(50, 8, 4000)
    hidden.requires_grad_()
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        head.project(hidden, weight, None, target)
    assert sum(kept) == hidden.numel()


def test_bfloat16_reduces_in_float32() -> None:
    hidden, weight, _, target = planted(64, 32, 500)
    hidden, weight = (hidden / 6).bfloat16(), weight.bfloat16()
    found = head.project(hidden, weight, None, target)[:, 0]
    assert found.dtype == torch.float32
    # What is left is one rounding of each logit, 2^-9 of its size.
    logits = (hidden @ weight.T).float()
    torch.testing.assert_close(
        found, logits.log_softmax(-1).gather(1, target[:, None])[:, 0], atol=1e-5, rtol=1e-5
    )


def test_the_head_is_itself_again_afterwards() -> None:
    linear = nn.Linear(4, 6)
    hidden = torch.randn(3, 4)
    calls: list[str] = []
    linear.register_forward_hook(lambda *_: calls.append("hook"))
    with head.heads_replaced(nn.Sequential(linear), lambda own, h: h * own.weight.sum()):
        assert linear(hidden).shape == (3, 4)
    assert calls == ["hook"] and linear(hidden).shape == (3, 6)
    with pytest.raises(TypeError, match="Identity"), head.heads_replaced(nn.Identity(), None):
        pass
