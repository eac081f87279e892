"""Planted truths and invariances of modality_importance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlalign.probes import modality_importance as modality
from mlalign.probes.modality_importance import METHOD
from tests.probes import eager, tiny

IMAGE = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0], dtype=torch.bool)


def test_importance_leaves_the_first_token_out() -> None:
    weights = torch.zeros(3, 1, 8)
    weights[0, 0] = torch.tensor([0.9, 0, 0.04, 0, 0, 0.02, 0.04, 0])
    weights[1, 0, 7] = weights[2, 0, 2] = 1
    share, looks = modality.importance(weights, IMAGE)
    assert share[:, 0].tolist() == pytest.approx([0.6, 0, 1])
    assert looks[:, 0].tolist() == [1, 0, 1]
    assert IMAGE[0].item() is False, "the mask that was given stays as it is"


def test_links_compare_with_the_other_boxes() -> None:
    maps = torch.zeros(1, 2, 6)
    maps[0, 0] = torch.tensor([0.1, 0.0, 0.3, 0.0, 0.2, 0.0])
    maps[0, 1] = torch.tensor([0.0, 0.4, 0.0, 0.1, 0.0, 0.0])
    own, second, third = (
        torch.tensor([i in box for i in range(6)]) for box in ((0, 1), (1, 2), (4, 5))
    )
    largest_WHP = maps.amax(1)[None]
    boxes_BP = torch.stack([own, second, third])
    linked, unlinked, gap = modality.links(largest_WHP, own[None], boxes_BP)[:, 0, 0].tolist()
    # Token 1 is in both boxes and counts for the word's own: 0.3 and 0.2 are left for the others.
    assert (linked, unlinked, gap) == pytest.approx((0.4, 0.25, 0.15))
    both = modality.links(largest_WHP.expand(2, 1, 6), torch.stack([own, third]), boxes_BP)
    # The last box's others are the first two, with 0.4 in each.
    assert both[:, 0, 1].tolist() == pytest.approx((0.2, 0.4, -0.2))
    alone = modality.links(largest_WHP, own[None], own[None])
    assert float(alone[0, 0, 0]) == pytest.approx(0.4) and alone[1:].isnan().all()


def test_no_query_means_shares_by_size() -> None:
    vlm = eager.uniform_in(tiny.new_vlm(), 1)
    probes = tiny.new_pass(vlm, [METHOD()], count=2)
    readings = probes.run(0)
    items = probes._batches[0].items
    lengths = [len(item.prefix) for item in items]
    expected = {
        "summary": [36 / (length - 1) for length in lengths],
        "response": [
            36 / (len(item.prefix) + own - 1)
            for item in items
            for ids in item.completions
            for own in range(len(ids))
        ],
        "question": [
            36 / place
            for item in items
            for place in range(len(item.prefix))
            if vlm.image_token_id not in item.prefix[place:]
        ],
    }
    for group, values in expected.items():
        for head in range(-1, tiny.HEADS):
            where = {"layer": 1, "head": head, "side": "adapted", "group": group}
            reading = tiny.one(readings, "importance", **where)
            assert reading.n == len(values)
            assert reading.value == pytest.approx(np.mean(values), abs=1e-6)
            looks = tiny.one(readings, "looks_at_image", **where).value
            assert looks == pytest.approx(np.mean(np.array(values) > 0.5), abs=1e-6)
    where = {"layer": 1, "side": "adapted", "group": "real"}
    assert tiny.one(readings, "linked_gap", **where).value == pytest.approx(0, abs=1e-7)
    assert tiny.one(readings, "linked_gap", layer=0, side="base", group="real").value != 0


def test_equals_eager_at_the_summary_and_at_links() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()], count=2)
    item, other = probes._batches[0].items
    other.boxes.clear()
    readings = probes.run(0)
    first = {-1: [], 0: []}
    linked: dict[int, list[float]] = {-1: [], 0: []}
    for completion, mentions in enumerate(item.mentions):
        weights_LHTT = eager.attention(vlm, item, completion)
        image_T = eager.image_columns(vlm, item, completion)
        for shift in first:
            rows_LHT = weights_LHTT[:, :, len(item.prefix) + shift]
            image_LH = rows_LHT[..., image_T].sum(-1)
            first[shift].append(float((image_LH / (1 - rows_LHT[..., 0])).mean()))
            for mention in (m for m in mentions if m.real and m.name in item.boxes):
                rows = torch.tensor(mention.tokens) + len(item.prefix) + shift
                patches_HQP = weights_LHTT[2][:, rows][..., image_T]
                largest_H = patches_HQP[..., item.boxes[mention.name]].amax((1, 2))
                linked[shift].append(float(largest_H.mean()))
    fixed = {"record": item.record.id, "side": "adapted", "group": "summary"}
    value = tiny.one(readings, "importance", **fixed)
    assert value.n == 1 and value.value == pytest.approx(first[-1][0], abs=1e-6)
    assert abs(value.value - np.mean(first[0])) > 1e-4
    reading = tiny.one(readings, "linked", layer=2, side="adapted", group="real")
    assert reading.n == len(linked[-1])
    assert reading.value == pytest.approx(np.mean(linked[-1]), abs=1e-6)
    assert abs(reading.value - np.mean(linked[0])) > 1e-5


def test_one_boxed_object_has_no_unlinked_pair() -> None:
    probes = tiny.new_pass(tiny.new_vlm(), [METHOD()], count=2)
    for item in probes._batches[0].items:
        for name in sorted(item.boxes)[1:]:
            del item.boxes[name]
    readings = probes.run(0)
    unlinked = tiny.one(readings, "unlinked", side="adapted", group="real")
    assert unlinked.n == 0 and math.isnan(unlinked.value)
    assert tiny.one(readings, "linked", side="adapted", group="real").n > 0


def test_fresh_adapter_batches_and_floor() -> None:
    fresh = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD(), count=2)
    assert {r.value for r in tiny.pick(fresh, side="delta") if r.n} == {0.0}
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), count=3, batch_size=size) for size in (1, 3))
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5, nan_ok=True)
    delta = tiny.one(alone, "importance", side="delta", group="summary")
    assert delta.noise < 1e-5 < abs(delta.value)
