"""Planted truths and invariances of top_drifted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mlalign.models._vlm import VLM
from mlalign.probes.top_drifted import METHOD, Settings
from tests.probes import tiny
from tests.probes.ranks import equal, gathered


def small() -> Any:
    return METHOD(Settings(top=5))


def moving(neuron: int, size: float, layer: int = 1) -> VLM:
    """An adapter that changes one row of up_proj of one layer: one neuron's coefficient."""
    targets = rf".*language_model\.layers\.{layer}\.mlp\.up_proj"
    vlm = tiny.with_lora(tiny.new_vlm(), targets=targets)
    with torch.no_grad():
        vlm.layers[layer].mlp.up_proj.lora_B["default"].weight[neuron] = size
    return vlm


def test_the_one_neuron_that_moves_is_found_with_what_it_writes() -> None:
    vlm = moving(17, 2.0)
    token = 40
    with torch.no_grad():
        head = vlm.core.get_output_embeddings().weight
        head[token] *= 3
        vlm.layers[1].mlp.down_proj.weight[:, 17] = head[token]
    probes = tiny.new_pass(vlm, [small()])
    readings = probes.run(0)
    # In its own layer nothing else moves; the layer above moves because of it.
    assert tiny.one(readings, "share_of_one", layer=1).value == pytest.approx(1)
    assert tiny.one(readings, "change", layer=0).value == 0
    first = next(row for row in probes.tables["neurons"] if row["layer"] == 1)
    assert first["neuron"] == 17 and first["score"] > 100 * first["noise"]
    assert first["written"][0] == vlm.tokenizer.decode([token])
    assert len(first["written"]) == 8
    with torch.no_grad():
        logits = head @ vlm.layers[1].mlp.down_proj.weight[:, 17]
    expected = [vlm.tokenizer.decode([int(t)]) for t in logits.topk(8).indices]
    assert first["written"] == expected


def test_scores_equal_brute_force() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    probes = tiny.new_pass(vlm, [METHOD(Settings(top=5, tokens=1000))], count=2)
    probes.run(0)
    sums, base, tokens = np.zeros((3, tiny.NEURONS)), np.zeros((3, tiny.NEURONS)), 0
    for item in probes._batches[0].items:
        for completion in item.completions:
            sides = []
            for off in (True, False):
                held: list[torch.Tensor] = []
                hooks = [
                    layer.mlp.down_proj.register_forward_pre_hook(
                        lambda _m, args, held=held: held.append(args[0][0])
                    )
                    for layer in vlm.layers
                ]
                inputs = {
                    "input_ids": torch.tensor([item.prefix + completion]),
                    "pixel_values": item.image.tensors["pixel_values"],
                }
                with torch.no_grad():
                    if off:
                        with vlm.adapter_off():
                            vlm.model(**inputs)
                    else:
                        vlm.model(**inputs)
                for hook in hooks:
                    hook.remove()
                sides.append(torch.stack(held)[:, len(item.prefix) :])
            sums += (sides[1] - sides[0]).square().sum(1).numpy()
            base += sides[0].square().sum(1).numpy()
            tokens += len(completion)
    scores = np.sqrt(sums / tokens)
    best = np.argsort(-scores, axis=None)[:5]
    rows = probes.tables["neurons"]
    assert [row["layer"] * tiny.NEURONS + row["neuron"] for row in rows] == best.tolist()
    for row, index in zip(rows, best, strict=True):
        assert row["score"] == pytest.approx(scores.ravel()[index], rel=1e-4)
        relative = scores.ravel()[index] / np.sqrt(base.ravel()[index] / tokens)
        assert row["relative"] == pytest.approx(relative, rel=1e-4)


def test_a_fresh_adapter_has_no_top_set() -> None:
    probes = tiny.new_pass(tiny.with_lora(tiny.new_vlm()), [small()])
    readings = probes.run(0)
    assert tiny.one(readings, "change").value == 0
    assert math.isnan(tiny.one(readings, "share_of_one").value)
    assert math.isnan(tiny.one(readings, "top_kept_last").value)
    assert probes.tables["neurons"] == []


def test_spread_change_is_not_held_by_few() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm(), b_std=0.2), METHOD(Settings(top=20)))
    share = tiny.one(readings, "share_of_top").value
    chance = tiny.one(readings, "share_of_top_random")
    assert chance.lo < chance.value < chance.hi < share < 0.8
    replicated = tiny.one(readings, "top_replicated").value
    assert replicated > tiny.one(readings, "top_replicated_random").hi
    one = tiny.one(readings, "share_of_one")
    assert one.lo < one.value < one.hi and one.n > 40


def test_stability_over_passes_and_a_resumed_run() -> None:
    vlm = tiny.with_lora(tiny.new_vlm())
    probe = small()
    probes = tiny.new_pass(vlm, [probe])
    probes.run(0)
    up = vlm.layers[0].mlp.up_proj.lora_B["default"].weight
    with torch.no_grad():
        up[:5] = 3.0
    started = probes.run(1)
    assert math.isnan(tiny.one(started, "top_kept_last").value)
    again = probes.run(2)
    assert tiny.one(again, "top_kept_last").value == 1
    assert tiny.one(again, "top_kept_first").value == 1
    with torch.no_grad():
        up.zero_()
        up[-5:] = 9.0
    kept = probe.remember()
    moved = probes.run(3)
    assert tiny.one(moved, "top_kept_first").value < 0.5
    resumed = small()
    resumed.recall(kept)
    equal(moved, tiny.new_pass(vlm, [resumed]).run(3))


def test_evenly_spaced_tokens_of_a_long_answer() -> None:
    readings = tiny.run(tiny.new_vlm(), METHOD(Settings(tokens=3)))
    assert tiny.one(readings, "change").n == 4 * 3


def test_batches_and_ranks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone = tiny.run(vlm, small(), batch_size=1)
    equal(alone, tiny.run(vlm, small(), batch_size=4))
    equal(alone, gathered(monkeypatch, vlm, small, world=2)[1])
    assert tiny.one(alone, "unread").value == 0


def test_full_fine_tuning_is_compared_with_step_0() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [small()])
    probes.run(0)
    with torch.no_grad():
        vlm.layers[2].mlp.up_proj.weight[9] += 1.0
    readings = probes.run(1)
    assert tiny.one(readings, "change", layer=1).value == 0
    assert [(row["layer"], row["neuron"]) for row in probes.tables["neurons"]] == [(2, 9)]
