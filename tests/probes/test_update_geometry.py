"""Planted truths and invariances of update_geometry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from mlalign.models._vlm import VLM
from mlalign.probes._weights import lora_modules
from mlalign.probes.update_geometry import (
    METHOD,
    Settings,
    between,
    intruders,
    stable_rank,
    update_directions,
)
from tests.probes import tiny


def pieces() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W of rank 12 with its left singular vectors, and a direction that W never writes to."""
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    weight = left[:, :12] @ torch.diag(torch.linspace(5, 1, 12).double()) @ right[:, :12].T
    return weight, left, right


def test_a_new_direction_intrudes_and_an_old_one_does_not() -> None:
    weight, left, right = pieces()
    new = 10 * torch.outer(left[:, 15], right[:, 3])
    old = 10 * torch.outer(left[:, 2], right[:, 2])
    for matrix, update, transposed in ((weight, (new, old), False), (weight.T, (new, old), True)):
        for planted, expected in zip(update, (1, 0), strict=True):
            if transposed:
                planted = 10 * torch.outer(right[:, 14 if expected else 2], left[:, 2])
            assert intruders(matrix, planted, 10, 0.5) == expected
    assert intruders(weight, torch.zeros_like(weight), 10, 0.5) == 0


def test_intruders_equal_the_full_decomposition() -> None:
    torch.manual_seed(1)
    for shape in ((24, 40), (40, 24)):
        weight = torch.randn(shape, dtype=torch.float64)
        update = torch.randn(shape[0], 3).double() @ torch.randn(3, shape[1]).double() * 3
        before = torch.linalg.svd(weight, full_matrices=False)[0]
        after = torch.linalg.svd(weight + update, full_matrices=False)[0][:, :10]
        expected = int(((after.T @ before).abs().amax(1) < 0.6).sum())
        assert intruders(weight, update, 10, 0.6) == expected
        assert 0 < expected < 10


def test_directions_are_those_of_the_explicit_update() -> None:
    torch.manual_seed(2)
    lora_b, lora_a = torch.randn(30, 4), torch.randn(4, 20)
    left, singular = update_directions(lora_b, lora_a, -0.5)
    explicit = torch.linalg.svd(-0.5 * lora_b.double() @ lora_a.double(), full_matrices=False)
    assert torch.allclose(singular, explicit[1][:4])
    assert torch.allclose((left.T @ explicit[0][:, :4]).abs(), torch.eye(4).double(), atol=1e-6)
    expected = float(explicit[1].square().sum() / explicit[1].max() ** 2)
    assert stable_rank(singular) == pytest.approx(expected)


def test_angles_equal_scipy() -> None:
    rng = np.random.default_rng(0)
    one, other = (np.linalg.qr(rng.normal(size=(12, q)))[0] for q in (3, 3))
    angles = subspace_angles(one, other)
    overlap, largest = between(one, other)
    assert overlap == pytest.approx(np.square(np.cos(angles)).mean())
    assert largest == pytest.approx(np.degrees(angles.max()))
    turned = one @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert between(one, turned) == pytest.approx((1, 0), abs=1e-6)
    assert between(np.eye(6)[:, :2], np.eye(6)[:, 2:4]) == pytest.approx((0, 90))
    assert all(math.isnan(v) for v in between(one, np.zeros((12, 0))))


def changed(vlm: VLM, **changes: Any) -> None:
    """Replace B (and A) of the first adapted module."""
    _, module, adapter = lora_modules(vlm.model)[0]
    with torch.no_grad():
        for name, value in changes.items():
            getattr(module, f"lora_{name}")[adapter].weight.copy_(value)


def test_a_change_of_basis_changes_nothing_and_merging_agrees() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    probe = METHOD(Settings(modules=100, leading=4))
    name, module, adapter = lora_modules(vlm.model)[0]
    first = probe.weights(vlm)[name]
    a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
    mix = torch.randn(4, 4) + 3 * torch.eye(4)
    changed(vlm, A=torch.linalg.inv(mix) @ a, B=b @ mix)
    again = probe.weights(vlm)[name]
    assert again["stable_rank"] == pytest.approx(first["stable_rank"], rel=1e-4)
    assert again["intruders"] == first["intruders"]
    assert again["overlap"] == pytest.approx(1, abs=1e-5)
    assert again["angle"] == pytest.approx(0, abs=0.05)
    before = module.get_base_layer().weight.detach().clone()
    module.merge()
    merged = module.get_base_layer().weight.detach() - before
    expected = merged.square().sum() / torch.linalg.matrix_norm(merged, 2) ** 2
    assert first["stable_rank"] == pytest.approx(float(expected), rel=1e-3)
    assert intruders(before, merged, 4, 0.5) == first["intruders"]


def test_turning_between_passes_and_over_a_resumed_run() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    probe = METHOD(Settings(modules=0))
    probes = tiny.new_pass(vlm, [probe])
    started = probes.run(0)
    overlap = tiny.one(started, "overlap")
    assert math.isnan(overlap.value) and overlap.n == 0
    assert tiny.one(started, "modules_skipped").value == len(lora_modules(vlm.model))
    kept = probe.remember()
    same = probes.run(1)
    assert tiny.one(same, "overlap").value == pytest.approx(1, abs=1e-5)
    name, module, adapter = lora_modules(vlm.model)[0]
    b = module.lora_B[adapter].weight.detach()
    changed(vlm, B=torch.linalg.qr(b, mode="complete")[0][:, 4:8])
    where = {"layer": 0, "group": name.partition("layers.0.")[2]}
    moved = probes.run(2)
    assert tiny.one(moved, "overlap", **where).value == pytest.approx(0, abs=1e-5)
    assert tiny.one(moved, "angle", **where).value == pytest.approx(90, abs=0.1)
    chance = tiny.one(moved, "overlap_random", **where).value
    assert chance == pytest.approx(4 / len(b))
    resumed = METHOD(Settings(modules=0))
    resumed.recall(kept)
    again = tiny.new_pass(vlm, [resumed]).run(2)
    assert [r.value for r in again] == pytest.approx([r.value for r in moved], nan_ok=True)


def test_random_spaces_overlap_by_chance() -> None:
    rng = np.random.default_rng(0)
    found = [
        between(*(np.linalg.qr(rng.normal(size=(50, 4)))[0] for _ in range(2)))[0]
        for _ in range(1000)
    ]
    assert np.mean(found) == pytest.approx(4 / 50, rel=0.05)


def test_which_modules_are_read_is_said() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    total = len(lora_modules(vlm.model))
    readings = tiny.run(vlm, METHOD(Settings(modules=5)))
    assert tiny.one(readings, "intruders").n == 5
    assert tiny.one(readings, "modules_skipped").value == total - 5
    narrow = tiny.run(vlm, METHOD(Settings(size=8)))
    none = tiny.one(narrow, "intruders")
    assert none.n == 0 and math.isnan(none.value)
    assert tiny.one(narrow, "modules_skipped").value == total


def test_no_update_and_no_adapter() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD(Settings(modules=2)))
    assert tiny.one(readings, "stable_rank").value == 0
    assert tiny.one(readings, "intruders").value == 0
    assert tiny.run(tiny.new_vlm(), METHOD()) == []
