"""Planted truths and invariances of overtrust."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlalign.probes import overtrust
from mlalign.probes.overtrust import METHOD, Settings, column_scores, middle_layer
from tests.probes import eager, tiny


def by_hand(w_NN: np.ndarray, scale: float) -> list[tuple[float, float, int]]:
    """Products in float64, column by column."""
    found = []
    for row in range(len(w_NN)):
        scores = [np.prod(scale * w_NN[column : row + 1, column]) for column in range(row + 1)]
        best = int(np.argmax(scores))
        log = math.log10(scores[best])
        found.append((log, log / (row - best + 1), best))
    return found


def causal(size: int, seed: int = 0) -> torch.Tensor:
    w_NN = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)).tril()
    return w_NN / w_NN.sum(-1, keepdim=True)


def test_equals_products_by_hand() -> None:
    for scale in (50.0, 3.0):
        found = column_scores(causal(12), scale)
        for row, (log, rate, best) in enumerate(by_hand(causal(12).double().numpy(), scale)):
            assert float(found[0][row]) == pytest.approx(log, abs=1e-5)
            assert float(found[1][row]) == pytest.approx(rate, abs=1e-5)
            assert int(found[2][row]) == best


def test_a_heavy_column_wins_from_where_it_stands() -> None:
    w_NN = causal(20)
    w_NN[4:] *= 0.05
    w_NN[4:, 4] = 0.95
    _, rate_N, best_N = column_scores(w_NN, 50.0)
    assert set(best_N[6:].tolist()) == {4}
    assert float(rate_N[-1]) == pytest.approx(math.log10(50 * 0.95), abs=1e-5)


def test_hundreds_of_factors_stay_finite() -> None:
    log_N, rate_N, _ = column_scores(torch.full((600, 600), 0.5).tril(), 50.0)
    assert float(log_N[-1]) == pytest.approx(600 * math.log10(25), rel=1e-5)
    assert float(rate_N[-1]) == pytest.approx(math.log10(25), rel=1e-5)


def test_heads_in_any_order() -> None:
    weights = torch.rand(4, 5, 9, generator=torch.Generator().manual_seed(2))
    columns = torch.tensor([3, 4, 5, 6, 7])
    one, other = (overtrust.window(w, columns) for w in (weights, weights[[2, 0, 3, 1]]))
    assert torch.equal(one, other)
    largest = weights.numpy().max(0)
    assert one.numpy() == pytest.approx((largest / largest.sum(-1, keepdims=True))[:, 3:8])


def test_layers() -> None:
    assert (middle_layer(32), middle_layer(40), middle_layer(3), middle_layer(1)) == (11, 14, 1, 0)
    with pytest.raises(ValueError, match="dopra_layer: 3"):
        tiny.new_pass(tiny.new_vlm(), [METHOD(Settings(dopra_layer=3))])


def test_equals_eager_and_never_crosses_answers() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD(Settings(dopra_layer=0))], count=2)
    readings = probes.run(0)
    item = probes._batches[0].items[1]
    found: dict[str, list[float]] = {"opera": [], "dopra": [], "shifted": []}
    repeats: list[float] = []
    for completion, ids in enumerate(item.completions):
        weights_LHTT = eager.attention(vlm, item, completion)
        own = slice(len(item.prefix), len(item.prefix) + len(ids) - 1)
        for name, layer in (("opera", 2), ("dopra", 0)):
            largest_TT = weights_LHTT[layer].max(0).values
            scaled_TT = (largest_TT / largest_TT.sum(-1, keepdim=True)).double().numpy()
            scores = by_hand(scaled_TT[own, own], 50.0)
            found[name] += [log for log, _, _ in scores]
            if name == "opera":
                counts = np.bincount([best for _, _, best in scores])
                repeats += [counts.max() / len(scores)] * len(scores)
                before = slice(own.start - 1, own.stop - 1)
                found["shifted"] += [s[0] for s in by_hand(scaled_TT[before, before], 50.0)]
    fixed = {"record": item.record.id, "side": "adapted", "group": "response"}
    for name in ("opera", "dopra"):
        reading = tiny.one(readings, f"{name}_log", **fixed)
        assert reading.n == len(found[name])
        assert reading.value == pytest.approx(np.mean(found[name]), abs=1e-4)
    assert abs(np.mean(found["opera"]) - np.mean(found["shifted"])) > 1e-2
    repeat = tiny.one(readings, "opera_repeat", **fixed).value
    assert repeat == pytest.approx(np.mean(repeats), abs=1e-6)


def test_only_its_two_layers_are_read() -> None:
    readings = tiny.run(tiny.new_vlm(), METHOD(), count=2)
    fixed = {"side": "base", "group": "real", "record": ""}
    assert {r.layer for r in tiny.pick(readings, metric="opera_log", **fixed)} == {-1, 2}
    assert {r.layer for r in tiny.pick(readings, metric="dopra_log", **fixed)} == {-1, 1}
    assert 0 <= tiny.one(readings, "opera_log_auroc", side="base").value <= 1


def test_fresh_adapter_batches_and_floor() -> None:
    fresh = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD(), count=2)
    assert {r.value for r in tiny.pick(fresh, side="delta") if r.n} == {0.0}
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), count=3, batch_size=size) for size in (1, 3))
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-4, nan_ok=True)
    delta = tiny.one(alone, "opera_log", side="delta", group="response")
    assert delta.noise < 1e-4 < abs(delta.value)
