"""Planted truths, a reference by hand and invariances of image_gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlalign.probes._probe import GROUPS
from mlalign.probes._records import COMPLETIONS
from mlalign.probes.image_gradient import KINDS, METHOD, METRICS, shares
from tests.probes import tiny

PLANTED = {
    "image": torch.tensor([0, 1]),
    "prompt": torch.tensor([2]),
    "response": torch.tensor([3]),
}


def named(values: torch.Tensor) -> dict[str, float]:
    return dict(zip(METRICS, values.tolist(), strict=True))


def test_shares_of_planted_gradients() -> None:
    # Norms 5, 0, 4, 1, 9; products -3, 0, 4, 2, 9; the last token is in no group.
    gradients = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 4.0], [1.0, 0.0], [9.0, 0.0]])
    inputs = torch.tensor([[-1.0, 0.0], [7.0, 7.0], [0.0, 1.0], [2.0, 5.0], [1.0, 0.0]])
    found = named(shares(inputs, gradients, PLANTED))
    assert [found[f"gradient_share_{g}"] for g in GROUPS] == pytest.approx([0.5, 0.4, 0.1])
    wanted = pytest.approx([3 / 9, 4 / 9, 2 / 9])
    assert [found[f"input_gradient_share_{g}"] for g in GROUPS] == wanted
    assert found["gradient_lift"] == pytest.approx(1.0)
    assert found["input_gradient_lift"] == pytest.approx(2 / 3)


def test_the_product_does_not_depend_on_the_scale_of_embeddings_and_the_norm_does() -> None:
    inputs, gradients = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([8.0, 8.0, 1.0, 1.0])[:, None]
    one = named(shares(inputs, gradients, PLANTED))
    other = named(shares(inputs * scale, gradients / scale, PLANTED))
    for group in GROUPS:
        name = f"input_gradient_share_{group}"
        assert one[name] == pytest.approx(other[name])
    assert other["gradient_share_image"] < 0.5 * one["gradient_share_image"]


@pytest.mark.parametrize("gradient", [0.0, math.inf, math.nan])
def test_no_gradient_or_an_infinite_one_has_no_shares(gradient: float) -> None:
    gradients = torch.zeros(4, 2)
    gradients[0, 0] = gradient
    assert all(map(math.isnan, shares(torch.ones(4, 2), gradients, PLANTED).tolist()))


def test_a_record_without_gradient_is_left_out() -> None:
    there = np.full((len(COMPLETIONS), len(METRICS)), 0.25)
    sides = [(there, there), (there, math.nan * there)]
    values = [{"id": str(i), "base": b, "adapted": a} for i, (b, a) in enumerate(sides)]
    readings = METHOD().readings(0, [values], [], None)
    for side, count in (("base", 2), ("adapted", 1), ("delta", 1)):
        found = tiny.one(readings, "gradient_share_image", side=side, group="own")
        assert (found.n, found.value) == (count, 0.0 if side == "delta" else 0.25)
    assert {r.record for r in tiny.pick(readings, side="adapted")} == {"", "0"}


def test_activations_that_are_not_finite_are_nan_and_nothing_fails() -> None:
    vlm = tiny.new_vlm()
    with torch.no_grad():
        vlm.layers[1].mlp.down_proj.weight[0, 0] = math.nan  # type: ignore[index, union-attr]
    readings = tiny.run(vlm, METHOD())
    assert readings and all(math.isnan(r.value) for r in readings)


def test_image_columns_that_nobody_reads_get_nothing() -> None:
    vlm = tiny.new_vlm()
    with torch.no_grad():
        for layer in vlm.layers:
            layer.self_attn.o_proj.weight.zero_()  # type: ignore[union-attr]
    readings = tiny.run(vlm, METHOD())
    for kind in KINDS:
        found = tiny.pick(readings, metric=f"{kind}_share_image")
        assert found and {r.value for r in found} == {0.0}
        # Each token is then predicted by itself: the prompt's last one writes the first token.
        assert 0 < tiny.one(readings, f"{kind}_share_prompt", side="adapted", group="own").value < 1


def test_an_image_of_zeros_has_no_product() -> None:
    vlm = tiny.new_vlm()
    with torch.no_grad():
        for parameter in vlm.core.model.multi_modal_projector.parameters():
            parameter.zero_()
    readings = tiny.run(vlm, METHOD())
    assert {r.value for r in tiny.pick(readings, metric="input_gradient_share_image")} == {0.0}


def test_equals_a_backward_by_hand() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()])
    readings = probes.run(0)
    item = probes._batches[0].items[1]
    model = vlm.core.model
    for completion, group in zip(item.completions, COMPLETIONS, strict=True):
        ids = torch.tensor([item.prefix + completion])
        image_T = ids[0] == vlm.image_token_id
        with torch.no_grad():
            embedded = model.get_input_embeddings()(ids)
            features = model.get_image_features(item.image.tensors["pixel_values"]).pooler_output
            embedded[0, image_T] = torch.cat(list(features))
        embedded.requires_grad_(True)
        hidden = model.language_model(inputs_embeds=embedded).last_hidden_state
        logits = vlm.core.lm_head(hidden)[0, len(item.prefix) - 1 : -1]
        logps = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])
        (gradient,) = torch.autograd.grad(logps.sum(), embedded)
        place_T = torch.arange(len(ids[0]))
        masks = (image_T, ~image_T & (place_T < len(item.prefix)), place_T >= len(item.prefix))
        for kind, size_T in (
            ("gradient", gradient[0].norm(dim=-1)),
            ("input_gradient", (gradient[0] * embedded[0]).sum(-1).abs()),
        ):
            wanted = [(size_T[mask].sum() / size_T.sum()).item() for mask in masks]
            fixed = {"record": item.record.id, "side": "adapted", "group": group}
            found = [tiny.one(readings, f"{kind}_share_{g}", **fixed).value for g in GROUPS]
            assert min(wanted) > 1e-3
            assert found == pytest.approx(wanted, abs=1e-4)
            assert sum(found) == pytest.approx(1, abs=1e-9)
            lift = tiny.one(readings, f"{kind}_lift", **fixed).value
            assert lift == pytest.approx(wanted[0] * len(image_T) / int(image_T.sum()), rel=1e-3)


def test_batches_do_not_matter_and_nothing_of_a_backward_is_left() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), batch_size=size) for size in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-4, nan_ok=True), one
    assert all(parameter.grad is None for parameter in vlm.model.parameters())
    name = "input_gradient_share_image"
    base, adapted, delta = (
        tiny.one(together, name, side=side, group="own") for side in ("base", "adapted", "delta")
    )
    assert delta.value == pytest.approx(adapted.value - base.value, abs=1e-9)
    assert abs(delta.value) > 1e-3 and delta.noise < 1e-4
    assert base.lo <= base.value <= base.hi and base.n == 4
