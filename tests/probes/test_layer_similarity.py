"""Planted truths and invariances of layer_similarity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mlalign.probes._behaviour import Shift, offset_estimates, word_positions
from mlalign.probes._probe import GROUPS
from mlalign.probes._stats import debiased_cka
from mlalign.probes.layer_similarity import METHOD, Settings
from tests.probes import tiny
from tests.probes.ranks import equal, gathered


def records(new_of: Any, layers: int = 3, count: int = 40) -> list[dict[str, Any]]:
    """One state per record, group and layer; ``new_of`` makes the adapted ones of the base's."""
    rng = np.random.default_rng(0)
    old = rng.normal(size=(layers, count, 16))
    new = new_of(old)
    zero = Shift(np.zeros((layers, 16)), np.full((layers, 16), np.nan))
    return [
        {
            "index": i,
            "states": {
                side: dict.fromkeys(GROUPS, each[:, i : i + 1])
                for side, each in (("base", old), ("adapted", new))
            },
            "shift": zero,
        }
        for i in range(count)
    ]


def read(values: list[dict[str, Any]], layers: list[int]) -> tuple[list[Any], list[Any]]:
    probe = METHOD()
    probe._layers = layers
    return probe.readings(0, [values], [], None), probe.tables()["layer_cka"]


def test_a_layer_that_moved_up_is_found_there() -> None:
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
    readings, rows = read(records(lambda old: 3 * old[[2, 0, 1]] @ turn + 5), [0, 4, 9])
    # Adapted layer 4 holds what base layer 0 held, 9 what 4 held, 0 what 9 held.
    shift = tiny.one(readings, "depth_shift", group="image")
    assert shift.value == pytest.approx(((4 - 0) + (9 - 4) + (0 - 9)) / 3)
    matrix = {
        (r["layer_base"], r["layer_adapted"]): r["value"] for r in rows if r["group"] == "prompt"
    }
    for pair, value in matrix.items():
        moved = pair in {(0, 4), (4, 9), (9, 0)}
        assert value == pytest.approx(1, abs=1e-6) if moved else abs(value) < 0.3
    own = tiny.one(readings, "cka", group="response")
    assert abs(own.value) < 0.3 and own.lo < own.value < own.hi and own.n == 40


def test_the_matrix_equals_direct_cka() -> None:
    rng = np.random.default_rng(2)
    values = records(lambda old: old + rng.normal(size=old.shape))
    _, rows = read(values, [0, 1, 2])
    old, new = (
        np.concatenate([v["states"][side]["image"] for v in values], axis=1)
        for side in ("base", "adapted")
    )
    for row in (r for r in rows if r["group"] == "image"):
        one, other = row["layer_base"], row["layer_adapted"]
        assert row["value"] == pytest.approx(debiased_cka(old[one], new[other]), abs=1e-9)
        assert row["base_value"] == pytest.approx(debiased_cka(old[one], old[other]), abs=1e-9)


def shifts(offset: np.ndarray, count: int = 30) -> list[Shift]:
    """Gaps of length 2 along axis 0 with noise; every record moved by ``offset``."""
    rng = np.random.default_rng(3)
    gaps = np.zeros((count, 2, 40))
    gaps[:, :, 0] = 2
    gaps += 0.3 * rng.normal(size=gaps.shape)
    return [Shift(np.tile(offset, (2, 1)), gap) for gap in gaps]


def test_an_offset_along_the_direction_and_across_it() -> None:
    axis = np.eye(40)
    along = offset_estimates(shifts(3 * axis[0]), [5, 7])
    cosine = along["offset_cosine", "", -1]
    assert cosine.value > 0.98 and cosine.n == 30
    assert along["offset_gaps", "", 7].value == pytest.approx(1.5, abs=0.1)
    shuffled = along["offset_cosine_shuffled", "", -1]
    assert shuffled.lo < 0 < shuffled.hi < cosine.lo
    against = offset_estimates(shifts(-3 * axis[0]), [5, 7])
    assert against["offset_cosine", "", 5].value == pytest.approx(
        -along["offset_cosine", "", 5].value
    )
    across = offset_estimates(shifts(axis[1]), [5, 7])["offset_cosine", "", -1]
    assert abs(across.value) < 0.1
    still = offset_estimates(shifts(0 * axis[0]), [5, 7])["offset_cosine", "", -1]
    assert still.value == 0


def test_records_without_both_kinds_are_left_out_of_the_direction() -> None:
    some = shifts(np.eye(40)[0])
    some[0] = Shift(some[0].moved_LD, np.full((2, 40), np.nan))
    assert offset_estimates(some, [0, 1])["offset_gaps", "", -1].n == 29
    none = [Shift(s.moved_LD, np.full((2, 40), np.nan)) for s in some]
    found = offset_estimates(none, [0, 1])["offset_cosine", "", -1]
    assert found.n == 0 and math.isnan(found.value)


def test_word_positions_are_those_of_the_words_last_tokens() -> None:
    probes = tiny.new_pass(tiny.new_vlm(), [METHOD()])
    batch = probes._batches[0]
    for row, item in enumerate(batch.items):
        real, absent = word_positions(batch, row)
        ids = batch.rows.input_ids_RT[row]
        words = [m for each in item.mentions for m in each]
        spelled = probes.vlm.tokenizer.batch_decode(ids[torch.cat([real, absent])][:, None])
        truth = [True] * len(real) + [False] * len(absent)
        assert len(absent) >= 1 and len(real) >= 1
        for text, kind in zip(spelled, truth, strict=True):
            assert any(text.strip() in m.name and m.real == kind for m in words), text


def test_a_fresh_adapter_resembles_itself() -> None:
    readings = tiny.run(tiny.with_lora(tiny.new_vlm()), METHOD())
    for group in GROUPS:
        assert tiny.one(readings, "cka", group=group).value == pytest.approx(1, abs=1e-9)
        assert tiny.one(readings, "depth_shift", group=group).value == 0
    assert tiny.one(readings, "offset_cosine").value == 0
    assert tiny.one(readings, "offset_cosine").n == 4


def test_layers_below_a_change_stay() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), 0.5, r".*language_model\.layers\.1\.mlp\.up_proj")
    readings = tiny.run(vlm, METHOD())
    assert tiny.one(readings, "cka", group="response", layer=0).value == pytest.approx(1, abs=1e-9)
    assert tiny.one(readings, "cka", group="response", layer=2).value < 0.9999
    assert tiny.one(readings, "offset_cosine", layer=0).value == 0
    assert tiny.one(readings, "offset_cosine", layer=2).value != 0
    gaps = tiny.one(readings, "offset_gaps", layer=2)
    assert gaps.lo <= gaps.value <= gaps.hi and abs(gaps.noise) < 1e-3


def test_chosen_blocks_are_spaced() -> None:
    readings = tiny.run(tiny.new_vlm(), METHOD(Settings(layers=2)))
    found = tiny.pick(readings, metric="cka", group="image")
    assert [r.layer for r in found] == [-1, 0, 2]


def test_batches_and_ranks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone = tiny.run(vlm, METHOD(), batch_size=1)
    equal(alone, gathered(monkeypatch, vlm, METHOD, world=2)[1], abs=1e-3)


def test_one_record_is_no_number_and_no_crash() -> None:
    readings = tiny.run(tiny.new_vlm(), METHOD(), count=1)
    assert math.isnan(tiny.one(readings, "cka", group="image").value)
    assert math.isnan(tiny.one(readings, "offset_cosine").lo)
