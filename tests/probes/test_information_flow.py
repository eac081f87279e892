"""Planted truths and invariances of information_flow."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlalign.probes import information_flow
from mlalign.probes._attention_rows import RowWatch
from mlalign.probes._probe import ATTENTION
from mlalign.probes.attention_allocation import METHOD as ALLOCATION
from mlalign.probes.information_flow import METHOD
from tests.probes import eager, tiny


def test_depth_is_where_the_flow_is() -> None:
    flow_NLH = np.zeros((5, 5, 2))
    flow_NLH[0, 0] = flow_NLH[1, 4] = 3
    flow_NLH[2, :, 1] = 1
    flow_NLH[3, 1] = flow_NLH[3, 3] = 0.2
    found = information_flow.depth(flow_NLH)
    assert found[:4].tolist() == pytest.approx([0, 1, 0.5, 0.5])
    assert math.isnan(found[4])
    assert information_flow.depth(np.ones((2, 1, 3))).tolist() == [0, 0]


def test_no_query_means_shares_by_size() -> None:
    vlm = eager.uniform_in(tiny.new_vlm(), 1)
    probes = tiny.new_pass(vlm, [METHOD()], count=2)
    readings = probes.run(0)
    for item in probes._batches[0].items:
        image = [token == vlm.image_token_id for token in item.prefix]
        last = len(image) - 1 - image[::-1].index(True)
        asked = len(image) - last - 1
        assert asked > 3
        # A token of the question sees itself and all before it.
        question = [36 / (place + 1) for place in range(last + 1, len(image))]
        visible = [len(image) + own for ids in item.completions for own in range(len(ids))]
        expected = {
            ("image_to_question", "question"): question,
            ("question_to_answer", "response"): [asked / v for v in visible],
            ("image_to_answer", "response"): [36 / v for v in visible],
        }
        for (metric, group), values in expected.items():
            probe = METHOD()
            assert group in probe.groups(metric)
            fixed = {"record": item.record.id, "side": "base", "group": group}
            assert tiny.one(readings, metric, **fixed).n == len(values)
            number = probe.metrics.index(metric)
            watch = probes._base[0]["information_flow"]
            assert isinstance(watch, RowWatch)
            side = watch.sides[item.index]
            mean = side.sums[group][1, number, 0] / side.counts[group][1, number]
            assert mean == pytest.approx(np.mean(values), abs=1e-6)


def test_equals_eager_and_a_shift_by_one_shows() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()], count=2)
    readings = probes.run(0)
    item = probes._batches[0].items[1]
    weights_LHTT = eager.attention(vlm, item, 0)
    image_T = eager.image_columns(vlm, item, 0)
    first = int(image_T.nonzero()[-1]) + 1
    mass_LT = weights_LHTT[..., image_T].sum(-1).mean(1)
    fixed = {"record": item.record.id, "side": "adapted"}
    value = tiny.one(readings, "image_to_question", group="question", **fixed).value
    assert value == pytest.approx(float(mass_LT[:, first : len(item.prefix)].mean()), abs=1e-6)
    assert abs(value - float(mass_LT[:, first - 1 : len(item.prefix) - 1].mean())) > 1e-4
    by_layer_L = mass_LT[:, first : len(item.prefix)].mean(1)
    depth = float((by_layer_L[1] / 2 + by_layer_L[2]) / by_layer_L.sum())
    reading = tiny.one(readings, "image_to_question_depth", group="question", **fixed)
    assert reading.value == pytest.approx(depth, abs=1e-5)
    rows, shifted = [], []
    for completion, ids in enumerate(item.completions):
        weights_LHTT = eager.attention(vlm, item, completion)
        asked_T = weights_LHTT[..., first : len(item.prefix)].sum(-1).mean((0, 1))
        rows += asked_T[len(item.prefix) - 1 : len(item.prefix) + len(ids) - 1].tolist()
        shifted += asked_T[len(item.prefix) : len(item.prefix) + len(ids)].tolist()
    value = tiny.one(readings, "question_to_answer", group="response", **fixed).value
    assert value == pytest.approx(np.mean(rows), abs=1e-6)
    assert abs(value - np.mean(shifted)) > 1e-4


def test_agrees_with_the_allocation_and_fresh_adapters_move_nothing() -> None:
    vlm = tiny.with_lora(tiny.new_vlm())
    readings = tiny.new_pass(vlm, [METHOD(), ALLOCATION()], count=2).run(0)
    for group in ("response", "real", "absent"):
        where = {"side": "adapted", "group": group}
        for flow, share in (
            ("image_to_answer", "alloc_image"),
            ("question_to_answer", "alloc_user"),
        ):
            one, other = (tiny.one(readings, metric, **where) for metric in (flow, share))
            assert one.value == pytest.approx(other.value, abs=1e-6) and one.n == other.n
    auroc = tiny.one(readings, "image_to_answer_auroc", side="base")
    assert auroc.value == tiny.one(readings, "alloc_image_auroc", side="base").value
    assert {r.value for r in tiny.pick(readings, side="delta") if r.n} == {0.0}
    assert METHOD.needs > {ATTENTION}


def test_batches_and_padding_do_not_matter() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), count=3, batch_size=size) for size in (1, 3))
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5, nan_ok=True)
    delta = tiny.one(alone, "image_to_question", side="delta", group="question")
    assert delta.noise < 1e-5 < abs(delta.value)
