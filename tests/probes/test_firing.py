"""Planted truths and invariances of firing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlalign.probes._firing_counts import Counts, contrast, dape, miner, specific
from mlalign.probes._probe import GROUPS
from mlalign.probes.firing import METHOD
from tests.probes import tiny
from tests.probes.ranks import equal, gathered


def counts(fired_LKF: np.ndarray, tokens: tuple[int, int, int]) -> Counts:
    shape = np.maximum(tokens, 1)[:, None]
    return Counts(np.array(tokens), fired_LKF, fired_LKF * 1.0, fired_LKF / shape)


def planted() -> Counts:
    """Neuron 5 of layer 1 fires on every image token and on no other; 7 on every token."""
    rng = np.random.default_rng(0)
    tokens = (100, 20, 30)
    fired_LKF = np.stack([rng.binomial(n, 0.4, (2, 128)) for n in tokens], axis=1)
    fired_LKF[1, :, 5] = (100, 0, 0)
    fired_LKF[1, :, 7] = tokens
    fired_LKF[0, :, 9] = 0
    return counts(fired_LKF, tokens)


def test_an_image_only_neuron_has_contrast_one_and_the_lowest_entropy() -> None:
    found = planted()
    entropy = dape(found.rates_LKF())
    assert contrast(found)[1, 5] == 1
    assert entropy[1, 5] == 0 and np.nanargmin(entropy) == 128 + 5
    assert entropy[1, 7] == pytest.approx(math.log(3), abs=1e-12)
    assert math.isnan(entropy[0, 9]) and math.isnan(contrast(found)[0, 9])
    assert 128 + 5 in specific(found.rates_LKF())["image"]
    assert 128 + 5 in miner(found)["image"] and 128 + 5 not in miner(found)["text"]
    probe = METHOD()
    blocks = [{"base": found, "adapted": found}]
    values = probe.statistics(blocks, "base")
    assert values["image_selective", "", -1] == values["image_selective", "", 1] == 1
    assert values["text_selective", "", -1] == 0
    assert values["dead", "", 0] == 1 and values["dead", "", -1] == 1


def test_specific_neurons_are_those_of_the_definition() -> None:
    rates = planted().rates_LKF()
    bar = np.percentile(rates, 95)
    entropy = dape(rates).ravel()
    loud = rates.max(1).ravel() > bar
    lowest = sorted((e, i) for i, e in enumerate(entropy) if loud[i])[: round(0.01 * 256)]
    for k, group in enumerate(GROUPS):
        expected = sorted(i for _, i in lowest if rates[:, k].ravel()[i] > bar)
        assert specific(rates)[group].tolist() == expected


def test_dead_and_newly_alive() -> None:
    old, new = planted(), planted()
    new.fired_LKF = new.fired_LKF.copy()
    new.fired_LKF[0, :, :3] = 0
    new.fired_LKF[0, 0, 9] = 1
    values = METHOD().statistics([{"base": old, "adapted": new}], "delta")
    assert values["newly_dead", "", 0] == 3 and values["newly_dead", "", 1] == 0
    assert values["newly_alive", "", -1] == 1
    assert values["dead", "", -1] == 2


def test_watch_counts_classes_and_no_padding() -> None:
    probes = tiny.new_pass(tiny.new_vlm(), [probe := METHOD()])
    batch = probes._batches[0]
    watch = probe.watch(probes.vlm, batch)
    gate = torch.full((*batch.rows.segment_RT.shape, tiny.NEURONS), -1.0)
    gate[..., 0] = 1.0
    gate[..., 1][batch.image_RT] = 2.0
    for layer in range(tiny.LAYERS):
        watch.hidden(layer, "gate", gate)
    assert min(batch.length(row) for row in range(2)) < gate.shape[1], "a row must be padded"
    for row, item in enumerate(batch.items):
        found = watch.of(row)
        prompt = len(item.prefix) - 36
        assert found.tokens_K.tolist() == [36, prompt, sum(map(len, item.completions))]
        assert (found.fired_LKF[:, :, 0] == found.tokens_K).all()
        assert found.fired_LKF[1, :, 1].tolist() == [36, 0, 0]
        assert found.max_LKF[2, 0, 1] == pytest.approx(float(torch.nn.functional.silu(gate.max())))
        assert (contrast(found)[:, 1] == 1).all()


def test_equals_brute_force_on_stored_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    (condensed,), readings = gathered(monkeypatch, vlm, METHOD)
    item = tiny.new_pass(vlm, [METHOD()])._batches[0].items[1]
    held: list[torch.Tensor] = []
    hook = vlm.layers[2].mlp.gate_proj.register_forward_hook(lambda _m, _a, out: held.append(out))
    for completion in item.completions:
        ids = torch.tensor([item.prefix + completion])
        with torch.no_grad():
            vlm.model(input_ids=ids, pixel_values=item.image.tensors["pixel_values"])
    hook.remove()
    length = len(item.prefix)
    image = torch.tensor(item.prefix) == vlm.image_token_id
    states = {
        "image": held[0][0, :length][image],
        "prompt": held[0][0, :length][~image],
        "response": torch.cat([each[0, length:] for each in held]),
    }
    # Four records lie in a block each.
    counted = condensed["blocks"][item.index]["adapted"]
    for k, group in enumerate(GROUPS):
        fired_F = (states[group] > 0).sum(0).numpy()
        assert (counted.fired_LKF[2, k] == fired_F).all()
        assert counted.tokens_K[k] == len(states[group])
    one = tiny.one(readings, "rate", record=item.record.id, side="adapted", group="prompt")
    assert one.value == pytest.approx(float(counted.rates_LKF()[:, 1].mean()))


def test_a_fresh_adapter_changes_nothing() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD())
    for metric in ("newly_dead", "newly_alive", "contrast", "dape", "dead"):
        assert tiny.one(readings, metric, side="delta").value == 0
    for group in GROUPS:
        moved = tiny.one(readings, "specific_moved", side="delta", group=group)
        kept = tiny.one(readings, "specific_kept", side="delta", group=group)
        assert math.isnan(kept.value) or (kept.value == 1 and moved.value == 0)
        if not math.isnan(kept.value):
            chance = tiny.one(readings, "specific_kept_random", side="delta", group=group)
            assert chance.value < 0.5
    assert tiny.one(readings, "miner_kept", side="delta", group="image").value == 1


def test_an_adapter_changes_rates_above_the_floor() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm(), b_std=0.3), METHOD())
    rate = tiny.one(readings, "rate", side="delta", group="response")
    sides = [tiny.one(readings, "rate", side=s, group="response") for s in ("base", "adapted")]
    assert rate.value == pytest.approx(sides[1].value - sides[0].value)
    assert sides[0].lo <= sides[0].value <= sides[0].hi
    assert abs(sides[0].noise) < 1e-3 < abs(rate.value)


def test_batches_and_ranks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone = tiny.run(vlm, METHOD(), batch_size=1)
    equal(alone, tiny.run(vlm, METHOD(), batch_size=4))
    equal(alone, gathered(monkeypatch, vlm, METHOD, world=2)[1])


def test_one_record_has_no_interval() -> None:
    readings = tiny.run(tiny.new_vlm(), METHOD(), count=1)
    rate = tiny.one(readings, "rate", side="base", group="image")
    assert math.isfinite(rate.value) and math.isnan(rate.lo)
    assert not tiny.pick(readings, metric="specific_replicated")


def test_no_token_of_a_class_is_no_number() -> None:
    found = planted()
    empty = counts(found.fired_LKF * np.array([1, 0, 0])[:, None], (100, 0, 0))
    values = METHOD().statistics([{"base": empty, "adapted": empty}], "base")
    assert math.isnan(values["rate", "prompt", -1]) and values["rate", "image", -1] > 0


def test_refuses_an_mlp_that_is_not_gated() -> None:
    vlm = tiny.new_vlm()
    del vlm.layers[1].mlp.gate_proj
    with pytest.raises(ValueError, match=r"firing: layer 1 has no mlp\.gate_proj"):
        tiny.new_pass(vlm, [METHOD()])
