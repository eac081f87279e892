"""Planted truths and invariances of attention_allocation."""

from __future__ import annotations

import pytest

from mlalign.probes.attention_allocation import ALLOC, COLUMNS, METHOD
from tests.probes import eager, tiny


def test_no_query_means_shares_by_size() -> None:
    vlm = eager.uniform_in(tiny.new_vlm(), 1)
    probes = tiny.new_pass(vlm, [METHOD()], count=2)
    readings = probes.run(0)
    expected: dict[str, list[float]] = {name: [] for name in COLUMNS}
    per_token, later = [], []
    for item in probes._batches[0].items:
        image = [token == vlm.image_token_id for token in item.prefix]
        sizes = {"system": image.index(True), "image": sum(image)}
        sizes["user"] = len(image) - sum(sizes.values())
        assert sizes["system"] and sizes["user"]
        for ids in item.completions:
            for own in range(len(ids)):
                visible = len(image) + own
                for name in COLUMNS:
                    expected[name].append({**sizes, "response": own}[name] / visible)
                per_token.append(1 / visible)
                later += [1 / visible] if own else []
    for name, values in expected.items():
        fixed = {"layer": 1, "side": "base", "group": "response"}
        reading = tiny.one(readings, f"alloc_{name}", **fixed)
        assert reading.n == len(values)
        assert reading.value == pytest.approx(sum(values) / len(values), abs=1e-6)
        wanted = later if name == "response" else per_token
        reading = tiny.one(readings, f"eff_{name}", **fixed)
        assert reading.n == len(wanted), "an answer's first row sees no token of the answer"
        assert reading.value == pytest.approx(sum(wanted) / len(wanted), abs=1e-7)


def test_equals_eager_and_a_shift_by_one_shows() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()])
    readings = probes.run(0)
    item = probes._batches[1].items[0]
    sums = {-1: 0.0, 0: 0.0}
    rows = 0
    for completion, ids in enumerate(item.completions):
        weights_LHTT = eager.attention(vlm, item, completion)
        columns = ~eager.image_columns(vlm, item, completion)
        columns[: item.prefix.index(vlm.image_token_id)] = False
        columns[len(item.prefix) :] = False
        for t in range(len(item.prefix), len(item.prefix) + len(ids)):
            for shift in sums:
                sums[shift] += float(weights_LHTT[:, :, t + shift, columns].sum(-1).mean())
        rows += len(ids)
    fixed = {"record": item.record.id, "side": "adapted", "group": "response"}
    value = tiny.one(readings, "alloc_user", **fixed).value
    assert value == pytest.approx(sums[-1] / rows, abs=1e-6)
    assert abs(value - sums[0] / rows) > 1e-4


def test_shares_sum_to_one_and_a_fresh_adapter_moves_none() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD(), count=2)
    for group in ("response", "real", "absent"):
        for layer in range(-1, tiny.LAYERS):
            fixed = {"layer": layer, "side": "adapted", "group": group}
            total = sum(tiny.one(readings, metric, **fixed).value for metric in ALLOC)
            assert total == pytest.approx(1, abs=1e-6)
    deltas = [r for r in tiny.pick(readings, side="delta") if r.n]
    assert deltas and all(r.value == 0 for r in deltas)


def test_batches_and_padding_do_not_matter() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), count=3, batch_size=size) for size in (1, 3))
    assert len(alone) == len(together) > 100
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5, nan_ok=True)
    delta = tiny.one(alone, "alloc_image", side="delta", group="response")
    assert delta.noise < 1e-5 < abs(delta.value)
    assert delta.lo <= delta.value <= delta.hi
