"""Planted truths and invariances of layer_entropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mlalign.branching.batch import TokenLogps
from mlalign.probes._lens import Lens
from mlalign.probes._probe import Watch
from mlalign.probes.layer_entropy import METHOD, Settings, _Entropy, entropies, spaced
from tests.probes import tiny

ALL = Settings(image_tokens=1000, response_tokens=1000)


def test_entropy_of_planted_distributions() -> None:
    head = 50 * torch.eye(6)
    lens = Lens(norm=lambda states: states, head_VD=head)
    states = torch.stack([torch.zeros(6), torch.eye(6)[2], torch.tensor([1.0, 1, 0, 0, 0, 0])])
    found = entropies(lens, states)
    torch.testing.assert_close(found, torch.tensor([6.0, 1.0, 2.0]).log(), rtol=0, atol=1e-5)
    assert entropies(lens, states[:0]).shape == (0,)


def test_the_norm_is_applied_once() -> None:
    lens = Lens(norm=lambda states: 2 * states, head_VD=torch.eye(4))
    states = torch.randn(3, 4)
    p = (2 * states).softmax(-1)
    torch.testing.assert_close(entropies(lens, states), -(p * p.log()).sum(-1))


def test_spaced_tokens_are_spread_and_never_repeat() -> None:
    for size in range(1, 40):
        for count in range(1, 12):
            found = spaced(torch.arange(size) + 5, count)
            assert len(set(found.tolist())) == min(size, count)
            assert found[0] == 5 and (count == 1 or found[-1] == size + 4)


class _WithLogps(_Entropy):
    """Keeps what the model itself says of its entropy at the rows that produce the response."""

    own: dict[int, float]

    def logps(self, view: str, logps: TokenLogps) -> None:
        sums_C = (logps.entropy_CS * logps.mask_CS).double().sum(-1)
        self.own = {
            item.index: float(sums_C[3 * row : 3 * row + 3].sum())
            for row, item in enumerate(self.batch.items)
        }


def test_the_last_block_is_the_model_itself() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    seen: list[_WithLogps] = []

    class Spy(METHOD):  # type: ignore[misc,valid-type]
        def watch(self, vlm: Any, batch: Any) -> Watch:
            seen.append(_WithLogps(batch, self.settings))
            return seen[-1]

    readings = tiny.run(vlm, Spy(ALL))
    last = tiny.LAYERS - 1
    assert len(seen) == 5
    for watch in seen:
        for index, own in watch.own.items():
            found = watch.sums[index][last, "response"]
            # Rows t would be other rows: their sum differs by far more.
            assert found == pytest.approx(own, rel=1e-5)
    # Base and adapted of the first batch, the repeat, base and adapted of the second.
    adapted = (seen[1], seen[4])
    total = sum(watch.own[i] for watch in adapted for i in watch.own)
    tokens = sum(watch.counts[i]["response"] for watch in adapted for i in watch.own)
    reading = tiny.one(readings, "entropy", side="adapted", layer=last, group="response")
    assert reading.n == tokens
    assert reading.value == pytest.approx(total / tokens, rel=1e-5)


def test_equals_a_forward_by_hand() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    probes = tiny.new_pass(vlm, [METHOD(ALL)])
    readings = probes.run(0)
    item = probes._batches[0].items[1]
    norm, head = vlm.core.model.language_model.norm, vlm.core.lm_head
    for layer in range(tiny.LAYERS):
        found: dict[str, list[torch.Tensor]] = {"image": [], "response": []}
        for completion in item.completions:
            ids = torch.tensor([item.prefix + completion])
            held: list[torch.Tensor] = []
            block = vlm.layers[layer]
            hook = block.register_forward_hook(lambda _m, _a, out, held=held: held.append(out))
            with torch.no_grad():
                vlm.model(input_ids=ids, pixel_values=item.image.tensors["pixel_values"])
                logps = head(norm(held[0][0])).log_softmax(-1)
            hook.remove()
            each = -(logps.exp() * logps).sum(-1)
            found["response"].append(each[len(item.prefix) - 1 : -1])
            found["image"] = [each[ids[0] == vlm.image_token_id]]
        for group, parts in found.items():
            where = {"side": "adapted", "layer": layer, "group": group, "record": item.record.id}
            reading = tiny.one(readings, "entropy", **where)
            assert reading.n == sum(map(len, parts))
            assert reading.value == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4)


def test_a_head_of_zeros_knows_nothing() -> None:
    vlm = tiny.new_vlm()
    with torch.no_grad():
        vlm.core.lm_head.weight.zero_()
    readings = tiny.run(vlm, METHOD())
    expected = math.log(len(vlm.tokenizer))
    for side in ("base", "adapted"):
        for reading in tiny.pick(readings, side=side):
            assert reading.value == pytest.approx(expected, abs=1e-5)
    assert {r.value for r in tiny.pick(readings, side="delta")} == {0.0}


def test_set_means_floors_and_counts() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    readings = tiny.run(vlm, METHOD(Settings(image_tokens=5)))
    for group, tokens in (("image", 5), ("response", 8)):
        where = {"group": group, "layer": 1}
        sides = {s: tiny.one(readings, "entropy", side=s, **where) for s in ("base", "adapted")}
        delta = tiny.one(readings, "entropy", side="delta", **where)
        assert delta.value == pytest.approx(sides["adapted"].value - sides["base"].value, abs=1e-9)
        assert delta.noise < 1e-4 < abs(delta.value)
        assert delta.lo <= delta.value <= delta.hi and delta.n == 4 * tokens
        each = [r.value for r in tiny.pick(readings, side="base", **where) if r.record]
        assert sum(each) / len(each) == pytest.approx(sides["base"].value)
        layers = [
            tiny.one(readings, "entropy", side="base", group=group, layer=n) for n in range(3)
        ]
        mean = tiny.one(readings, "entropy", side="base", group=group).value
        assert mean == pytest.approx(sum(r.value for r in layers) / 3)


def test_batches_and_padding_do_not_matter() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), batch_size=size) for size in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert (one.record, one.layer, one.n) == (other.record, other.layer, other.n)
        assert one.value == pytest.approx(other.value, rel=1e-3, abs=1e-4)
