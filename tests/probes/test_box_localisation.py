"""Planted truths and invariances of box_localisation."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mlalign.probes import box_localisation as boxes
from mlalign.probes.box_localisation import METHOD
from tests.probes import eager, tiny

INSIDE = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
"""A box of 2 x 2 in the upper right of 3 x 4 tokens."""


def test_all_attention_on_one_patch() -> None:
    maps = torch.zeros(2, 12)
    maps[0, 3] = maps[1, 9] = 1
    assert boxes.pointing(maps, INSIDE).tolist() == [1, 0]
    near = boxes.near(INSIDE, (3, 4), 1)
    assert near is not None and boxes.pointing(maps, near).tolist() == [1, 1]
    maps = torch.stack([INSIDE.float(), (~INSIDE).float()]) + 0.1 * torch.arange(12) / 12
    assert boxes.top_iou(maps, INSIDE).tolist() == [1, 0]
    assert boxes.patch_auroc(maps, INSIDE).tolist() == [1, 0]


def test_uniform_attention_is_at_chance() -> None:
    maps = torch.full((2, 12), 1 / 12)
    assert boxes.pointing(maps, INSIDE).tolist() == pytest.approx([4 / 12] * 2)
    assert boxes.patch_auroc(maps, INSIDE).tolist() == [0.5, 0.5]
    both = 4 * 4 / 12
    assert boxes.top_iou(maps, INSIDE).tolist() == pytest.approx([both / (8 - both)] * 2)


def test_equals_scikit_learn_and_brute_force() -> None:
    maps = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)).mul(8).round() / 8
    for map_P, value in zip(maps, boxes.patch_auroc(maps, INSIDE), strict=True):
        assert float(value) == pytest.approx(roc_auc_score(INSIDE.numpy(), map_P.numpy()))
    apart = maps + torch.arange(12) * 1e-3
    for map_P, value in zip(apart.numpy(), boxes.top_iou(apart, INSIDE), strict=True):
        top = set(np.argsort(-map_P)[:4].tolist())
        box = set(np.flatnonzero(INSIDE.numpy()).tolist())
        assert float(value) == pytest.approx(len(top & box) / len(top | box))


def test_chance_of_iou_is_the_mean_over_all_sets() -> None:
    box = {0, 1, 2}
    found = [len(box & set(s)) / len(box | set(s)) for s in combinations(range(8), 3)]
    assert boxes.chance_iou(3, 8) == pytest.approx(sum(found) / len(found))
    assert boxes.chance_iou(8, 8) == pytest.approx(1)


def test_flipping_image_and_box_changes_nothing() -> None:
    maps = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    flipped = maps.reshape(3, 3, 4).flip(-1).reshape(3, 12)
    box = INSIDE.reshape(3, 4).flip(-1).reshape(12)
    for score in (boxes.pointing, boxes.top_iou, boxes.patch_auroc):
        assert score(maps, INSIDE).tolist() == score(flipped, box).tolist()
    near, other = boxes.near(INSIDE, (3, 4), 1), boxes.near(box, (3, 4), 1)
    assert near is not None and other is not None
    assert near.reshape(3, 4).flip(-1).reshape(12).tolist() == other.tolist()


def test_near_is_a_ring_of_tokens_on_the_grid() -> None:
    near = boxes.near(torch.eye(16)[5] > 0, (4, 4), 1)
    assert near is not None
    assert near.nonzero()[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert boxes.near(torch.eye(16)[5] > 0, (3, 5), 1) is None


def test_no_query_is_at_chance_in_that_layer() -> None:
    vlm = eager.uniform_in(tiny.new_vlm(), 1)
    readings = tiny.run(vlm, METHOD(), count=3)
    for head in range(-1, tiny.HEADS):
        where = {"layer": 1, "head": head, "side": "adapted"}
        assert tiny.one(readings, "patch_auroc", **where).value == pytest.approx(0.5, abs=1e-6)
        for metric in ("pointing", "pointing_near"):
            chance = tiny.one(readings, f"{metric}_chance", side="adapted")
            reading = tiny.one(readings, metric, **where)
            assert 0 < chance.value < 1 and reading.n == chance.n > 3
            assert reading.value == pytest.approx(chance.value, abs=1e-6)
    other = tiny.one(readings, "patch_auroc", layer=0, side="base").value
    assert abs(other - 0.5) > 1e-3


def test_equals_eager_at_the_words_and_a_shift_by_one_shows() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()], count=2)
    item, other = probes._batches[0].items
    # With the other record's boxes gone, the set's mean by layer is this record's.
    other.boxes.clear()
    readings = probes.run(0)
    found: dict[int, list[float]] = {-1: [], 0: []}
    for completion, mentions in enumerate(item.mentions):
        weights_LHTT = eager.attention(vlm, item, completion)
        image_T = eager.image_columns(vlm, item, completion)
        for mention in (m for m in mentions if m.real and m.name in item.boxes):
            for shift, into in found.items():
                rows = torch.tensor(mention.tokens) + len(item.prefix) + shift
                map_HP = weights_LHTT[2][:, rows][..., image_T].mean(1)
                into.append(float(boxes.patch_auroc(map_HP, item.boxes[mention.name]).mean()))
    reading = tiny.one(readings, "patch_auroc", layer=2, side="adapted")
    assert reading.n == len(found[-1])
    assert reading.value == pytest.approx(np.mean(found[-1]), abs=1e-5)
    assert abs(reading.value - np.mean(found[0])) > 1e-4


def test_without_boxes_there_is_nothing_and_nothing_fails() -> None:
    probes = tiny.new_pass(tiny.with_lora(tiny.new_vlm(), b_std=0.2), [METHOD()], count=2)
    for batch in probes._batches:
        for item in batch.items:
            item.boxes.clear()
    readings = probes.run(0)
    assert {r.n for r in readings} == {0}
    assert all(math.isnan(r.value) for r in readings)
