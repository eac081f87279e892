"""Planted truths and invariances of neuron_drift."""

from __future__ import annotations

import math

import pytest
import torch

from mlalign.probes._pass import ProbePass
from mlalign.probes._probe import GROUPS
from mlalign.probes.neuron_drift import METHOD, TOKEN_METRICS, _metrics, lora_modules
from tests.probes import tiny


def values(readings: list, metric: str, layer: int) -> dict[str, float]:
    return {g: tiny.one(readings, metric, layer=layer, group=g).value for g in GROUPS}


def test_a_fresh_adapter_has_not_moved() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD())
    for metric in TOKEN_METRICS:
        assert {r.value for r in tiny.pick(readings, metric=metric)} == {0.0}
    for reading in tiny.pick(readings, metric="cka"):
        assert reading.value == pytest.approx(1, abs=1e-9)
    assert tiny.one(readings, "lora_norm", group="").value == 0
    assert tiny.one(readings, "lora_effective_rank", group="").value == 0


def test_layers_below_the_change_stand_still() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), 0.3, r".*language_model\.layers\.1\.self_attn\.q_proj")
    readings = tiny.run(vlm, METHOD())
    for metric in TOKEN_METRICS:
        assert set(values(readings, metric, 0).values()) == {0.0}
        assert all(value > 0 for value in values(readings, metric, 1).values())
        assert all(value > 0 for value in values(readings, metric, 2).values())
    assert all(value < 1 - 1e-6 for value in values(readings, "cka", 1).values())
    modules = tiny.pick(readings, metric="lora_norm", layer=1)
    assert [r.group for r in modules] == ["self_attn.q_proj"]
    rms = tiny.one(readings, "rms", group="response")
    assert rms.noise < 1e-4 < rms.value
    assert rms.lo < rms.value < rms.hi
    layer = tiny.one(readings, "rms", group="response", layer=1)
    each = tiny.pick(readings, metric="rms", group="response", layer=1)
    alone = [r.value for r in each if r.record]
    assert min(alone) <= layer.lo < layer.value < layer.hi <= max(alone)


def test_equals_brute_force_on_single_records() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    probes = tiny.new_pass(vlm, [METHOD()])
    readings = probes.run(0)
    item = probes._batches[0].items[1]
    layer = vlm.layers[2].mlp.down_proj
    sides: list[list[torch.Tensor]] = []
    for off in (True, False):
        held: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _m, args, held=held: held.append(args[0][0]))
        for completion in item.completions:
            ids = torch.tensor([item.prefix + completion])
            with torch.no_grad():
                if off:
                    with vlm.adapter_off():
                        vlm.model(input_ids=ids, pixel_values=item.image.tensors["pixel_values"])
                else:
                    vlm.model(input_ids=ids, pixel_values=item.image.tensors["pixel_values"])
        hook.remove()
        sides.append([states[len(item.prefix) :] for states in held])
    old, new = (torch.cat(side) for side in sides)
    expected = ((new - old).square().sum() / old.square().sum()).sqrt()
    fixed = {"record": item.record.id, "layer": 2, "group": "response"}
    reading = tiny.one(readings, "rms", **fixed)
    assert reading.value == pytest.approx(float(expected), rel=1e-4)
    assert reading.n == len(old)


def planted(old: torch.Tensor, new: torch.Tensor) -> dict[str, float]:
    fired = torch.zeros(len(old), 3, dtype=torch.bool)
    pairs = {"gate": (fired, ~fired), "coefficient": (old, new), "residual": (old, new)}
    return _metrics(METHOD()._token_sums(pairs, torch.arange(len(old))))


def test_a_constant_shift_is_all_offset() -> None:
    old = torch.randn(50, 8)
    shift = torch.randn(8)
    found = planted(old, old + shift)
    assert found["offset"] == pytest.approx(float(shift.norm() / old.norm(dim=-1).mean()), rel=1e-5)
    assert found["offset_coherence"] == pytest.approx(1, abs=1e-5)
    assert found["firing_rate_change"] == 1
    assert found["rms"] == pytest.approx(float(shift.norm() * 50**0.5 / old.norm()), rel=1e-5)


def test_opposite_shifts_have_no_offset() -> None:
    old = torch.randn(50, 8)
    shift = torch.randn(8) * torch.tensor([1.0, -1.0]).repeat(25)[:, None]
    found = planted(old, old + shift)
    assert found["offset"] < 1e-6 and found["offset_coherence"] < 1e-6 and found["rms"] > 0.1


def test_batches_and_padding_do_not_matter() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), batch_size=size) for size in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert (one.metric, one.record, one.n) == (other.metric, other.record, other.n)
        assert one.value == pytest.approx(other.value, rel=1e-3, abs=1e-6)


def test_groups_count_every_token_once() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()])
    readings = probes.run(0)
    items = [item for batch in probes._batches for item in batch.items]
    total = sum(len(i.prefix) + sum(map(len, i.completions)) for i in items)
    assert sum(tiny.one(readings, "rms", group=g).n for g in GROUPS) == total
    assert tiny.one(readings, "rms", group="image").n == 36 * len(items)


def set_update(module, b: torch.Tensor, a: torch.Tensor) -> None:
    with torch.no_grad():
        module.lora_B["default"].weight.copy_(b)
        module.lora_A["default"].weight.copy_(a)


def test_update_norm_and_rank() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    name, module, adapter = lora_modules(vlm.model)[3]
    a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
    explicit = 2.0 * b @ a  # alpha 8 / rank 4
    norm, rank = METHOD().weights(vlm)[name]
    assert norm == pytest.approx(float(explicit.norm() / module.weight.norm()), rel=1e-5)
    p = torch.linalg.svdvals(explicit)[:4]
    p = p / p.sum()
    assert rank == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-4)
    mix = torch.randn(4, 4) + 3 * torch.eye(4)
    set_update(module, b @ mix, torch.linalg.inv(mix) @ a)
    assert METHOD().weights(vlm)[name] == pytest.approx((norm, rank), rel=1e-4)
    set_update(module, b[:, :1] @ torch.ones(1, 4), torch.ones(4, 1) @ a[:1])
    assert METHOD().weights(vlm)[name][1] == pytest.approx(1, abs=1e-5)


def test_refuses_an_mlp_that_is_not_gated() -> None:
    vlm = tiny.new_vlm()
    del vlm.layers[1].mlp.gate_proj
    with pytest.raises(ValueError, match=r"layer 1 has no mlp\.gate_proj"):
        tiny.new_pass(vlm, [METHOD()])


def test_full_fine_tuning_is_compared_with_step_0() -> None:
    vlm = tiny.new_vlm()
    probes: ProbePass = tiny.new_pass(vlm, [METHOD()])
    assert tiny.one(probes.run(0), "rms", group="image").value == 0
    with torch.no_grad():
        vlm.layers[1].mlp.gate_proj.weight.mul_(1.1)
    readings = probes.run(1)
    assert values(readings, "rms", 0) == dict.fromkeys(GROUPS, 0.0)
    assert values(readings, "rms", 1)["image"] > 0.01
    assert not tiny.pick(readings, metric="lora_norm")


def test_no_token_is_no_number() -> None:
    sums = METHOD()._token_sums(
        {k: (torch.ones(3, 2), torch.ones(3, 2)) for k in ("gate", "coefficient", "residual")},
        torch.zeros(0, dtype=torch.long),
    )
    assert all(math.isnan(value) for value in _metrics(sums).values())
