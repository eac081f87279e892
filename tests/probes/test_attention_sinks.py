"""Planted truths and invariances of attention_sinks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlalign.probes import attention_sinks as sinks
from mlalign.probes._attention_rows import RowWatch
from mlalign.probes._probe import ProbeBatch
from mlalign.probes.attention_allocation import METHOD as ALLOCATION
from mlalign.probes.attention_sinks import METHOD, Settings
from tests.probes import eager, tiny

DIM, ABOVE = 7, math.sqrt(400 / 4096)


def prepared(settings: Settings | None = None, count: int = 2) -> tuple[Any, ProbeBatch]:
    probes = tiny.new_pass(tiny.new_vlm(), [METHOD(settings)], count=count)
    return probes.methods[0], probes._batches[0]


def states(batch: ProbeBatch, tokens: list[int], share: float, dim: int = DIM) -> Tensor:
    """(R, T, D): the first token and these have ``share`` of their energy in one dimension."""
    shape = (*batch.rows.input_ids_RT.shape, tiny.WIDTH)
    made = torch.full(shape, 1 / math.sqrt(tiny.WIDTH))
    for token, each in ((0, 0.9), *((t, share) for t in tokens)):
        made[:, token] = math.sqrt((1 - each) / (tiny.WIDTH - 1))
        made[:, token, dim] = math.sqrt(each)
    return made


def seen(probe: Any, batch: ProbeBatch, hidden: Tensor) -> RowWatch:
    """A watch that was shown one block's output and the next block's uniform attention."""
    watch = probe.watch(None, batch)
    watch.hidden(0, "residual", hidden)
    for row in range(len(batch.items)):
        watch.attention(1, row, eager.uniform_rows(batch, row))
    return watch


def value(watch: RowWatch, batch: ProbeBatch, group: str, metric: str) -> float:
    side, number = watch.sides[batch.items[0].index], METHOD.metrics.index(metric)
    return float(side.sums[group][1, number, 0] / side.counts[group][1, number])


def test_planted_sinks_are_found_and_uniform_attention_has_lift_one() -> None:
    probe, batch = prepared(Settings(count=1))
    image = batch.image_RT[0].nonzero()[:, 0].tolist()
    watch = seen(probe, batch, states(batch, [image[3], image[20], image[21]], 0.5))
    assert probe._dims == {1: [DIM]}
    assert value(watch, batch, "image", "sink_tokens") == pytest.approx(3 / 36)
    assert value(watch, batch, "image", "sink_tokens_random") == 0
    assert value(watch, batch, "image", "first_energy") == pytest.approx(0.9)
    assert value(watch, batch, "response", "sink_lift") == pytest.approx(1)
    visible = torch.cat(
        [len(batch.items[0].prefix) + torch.arange(len(q)) for q in batch.queries(0)]
    )
    mass = float((1 / visible).mean())
    assert value(watch, batch, "response", "sink_mass") == pytest.approx(3 * mass)
    assert value(watch, batch, "response", "nonsink_mass") == pytest.approx(33 * mass)


def test_the_threshold_is_an_energy_and_text_is_no_image_sink() -> None:
    probe, batch = prepared(Settings(count=1))
    image = batch.image_RT[0].nonzero()[:, 0].tolist()
    for share, tokens in ((ABOVE**2 + 0.01, [image[5], 1]), (ABOVE**2 - 0.01, [])):
        watch = seen(probe, batch, states(batch, [image[5], 1], share))
        expected = sum(t in image for t in tokens) / 36
        assert value(watch, batch, "image", "sink_tokens") == pytest.approx(expected)
    number = METHOD.metrics.index("sink_lift")
    side = watch.sides[batch.items[0].index]
    assert side.counts["response"][1, number] == 0, "without a sink there is no lift"
    assert value(watch, batch, "response", "sink_mass") == 0


def test_dimensions_stay_those_of_the_first_forward() -> None:
    probe, batch = prepared(Settings(count=1))
    image = batch.image_RT[0].nonzero()[:, 0].tolist()
    seen(probe, batch, states(batch, [image[0]], 0.5))
    later = seen(probe, batch, states(batch, [image[0]], 0.5, dim=3))
    assert value(later, batch, "image", "sink_tokens") == 0
    resumed, _ = prepared(Settings(count=1))
    resumed.recall(probe.remember())
    assert resumed._dims == probe._dims == {1: [DIM]}
    assert probe.tables()["attention_sink_dims"] == [{"layer": 1, "dims": [DIM]}]
    known, _ = prepared(Settings(dims=(3,)))
    watch = seen(known, batch, states(batch, [image[0]], 0.5, dim=3))
    assert value(watch, batch, "image", "sink_tokens") == pytest.approx(1 / 36)


def test_energies_do_not_depend_on_scale() -> None:
    states_TD = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sinks.energies(states_TD), sinks.energies(37 * states_TD))
    ratio_TD = states_TD.abs() / states_TD.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(sinks.energies(states_TD), ratio_TD.square() / 16)
    largest = np.sort(np.argsort(-states_TD[0].abs().numpy())[:3])
    assert sinks.sink_dims(states_TD[0], 3).tolist() == largest.tolist()


def test_rows_that_begin_with_the_image_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.new_vlm()
    monkeypatch.setattr(type(vlm), "prefix_ids", lambda self, *_: [self.image_token_id])
    with pytest.raises(ValueError, match="begin with an image token"):
        METHOD().prepare(vlm)
    METHOD(Settings(dims=(3,))).prepare(vlm)
    with pytest.raises(ValueError, match=r"dims \[32\]"):
        METHOD(Settings(dims=(32,))).prepare(vlm)


def test_sinks_and_the_rest_are_the_image_and_layer_0_is_not_read() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    probe = METHOD()
    readings = tiny.new_pass(vlm, [probe, ALLOCATION()], count=2).run(0)
    for side in ("base", "adapted"):
        for layer in (1, 2):
            where = {"layer": layer, "side": side, "group": "response"}
            parts = [tiny.one(readings, f"{m}_mass", **where).value for m in ("sink", "nonsink")]
            assert sum(parts) == pytest.approx(tiny.one(readings, "alloc_image", **where).value)
            assert all(0 < part < 1 for part in parts)
    assert not tiny.pick(readings, metric="sink_mass", layer=0)
    assert sorted(probe._dims) == [1, 2]


def test_dimensions_are_the_bases_and_batches_do_not_matter() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    methods = [METHOD(), METHOD(), METHOD()]
    with vlm.adapter_off():
        tiny.run(vlm, methods[0], count=2)
    runs = [
        tiny.run(vlm, method, count=3, batch_size=size)
        for method, size in zip(methods[1:], (1, 3), strict=True)
    ]
    assert methods[0]._dims == methods[1]._dims == methods[2]._dims
    for one, other in zip(*runs, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5, nan_ok=True)
    delta = tiny.one(runs[0], "nonsink_mass", side="delta", group="response")
    assert delta.noise < 1e-5 < abs(delta.value)


def test_a_fresh_adapter_changes_nothing() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD(), count=2)
    assert {r.value for r in tiny.pick(readings, side="delta") if r.n} == {0.0}
