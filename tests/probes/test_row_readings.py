"""Means, AUROC and intervals that the grounding probes share, against independent references."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mlalign.objects import vocabulary
from mlalign.probes import _row_readings
from mlalign.probes._attention_rows import reduce_rows
from mlalign.probes._pass import ProbePass
from mlalign.probes._row_readings import Cells, Words
from mlalign.probes._stats import auroc, interval
from mlalign.probes.attention_allocation import METHOD
from tests.probes import tiny

FIXED: dict[str, Any] = {"step": 3, "probe": "some"}


def new_cells(seed: int, heads: int = 2, records: int = 7) -> Cells:
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 5, (records, 1)).repeat(3, 1).astype(float)
    return Cells(generator.random((records, 3, heads)) * counts[..., None], counts)


def test_intervals_are_those_of_the_shared_bootstrap() -> None:
    cells = new_cells(0)
    sides = {"base": cells, "adapted": cells}
    made = _row_readings.means(
        {**FIXED, "group": "real"}, "mass", list("abcdefg"), sides, sides, heads=True
    )
    for layer, head in np.ndindex(3, 2):
        reading = tiny.one(made, "mass", layer=layer, head=head, side="base")
        sums, counts = cells.sums_NLH[:, layer, head], cells.counts_NL[:, layer]
        assert (reading.lo, reading.hi) == pytest.approx(interval(sums.tolist(), counts.tolist()))
        assert reading.value == pytest.approx(sums.sum() / counts.sum())
        assert reading.n == counts.sum()
    heads = [r.value for r in made if r.layer == 1 and r.head >= 0 and r.side == "base"]
    assert tiny.one(made, "mass", layer=1, side="base").value == pytest.approx(np.mean(heads))
    layers = [r.value for r in made if r.layer >= 0 and r.head < 0 and r.side == "base"]
    assert tiny.one(made, "mass", side="base").value == pytest.approx(np.mean(layers))


def test_delta_is_of_pairs_and_its_noise_of_two_runs() -> None:
    base = new_cells(1)
    shifted = Cells(base.sums_NLH + 0.25 * base.counts_NL[..., None], base.counts_NL)
    again = {
        "base": base,
        "adapted": Cells(base.sums_NLH - 1e-3 * base.counts_NL[..., None], base.counts_NL),
    }
    sides = {"base": base, "adapted": shifted}
    made = _row_readings.means({**FIXED, "group": "real"}, "mass", list("abcdefg"), sides, again)
    delta = tiny.one(made, "mass", side="delta")
    assert [delta.value, delta.lo, delta.hi] == pytest.approx([0.25] * 3)
    assert delta.noise == pytest.approx(1e-3)
    assert math.isnan(tiny.one(made, "mass", side="adapted").noise)
    own = {r.record: r.value for r in made if r.record and r.side == "base"}
    for record, sums, counts in zip("abcdefg", base.sums_NLH, base.counts_NL, strict=True):
        if counts[0]:
            assert own.pop(record) == pytest.approx(sums.mean() / counts[0])
    assert not own, "records without a row have no reading"


def test_nothing_counted_is_one_empty_reading_per_side() -> None:
    empty = Cells(np.zeros((4, 3, 1)), np.zeros((4, 3)))
    sides = {"base": empty, "adapted": empty}
    made = _row_readings.means({**FIXED, "group": "real"}, "mass", list("abcd"), sides, sides)
    assert [(r.side, r.n, math.isnan(r.value)) for r in made] == [
        (side, 0, True) for side in ("base", "adapted", "delta")
    ]


def new_words(seed: int, planted: tuple[int, int] = (1, 2)) -> Words:
    """Rounded values, so that there are ties; one head parts the words without error."""
    generator = np.random.default_rng(seed)
    real = [generator.random(count) < 0.6 for count in (4, 0, 5, 3, 6)]
    values = [generator.random((len(each), 2, 4)).round(1) for each in real]
    for value, each in zip(values, real, strict=True):
        value[(slice(None), *planted)] = each + 0.1 * value[(slice(None), *planted)]
    return Words({"base": values, "adapted": values}, real)


def test_auroc_is_sklearns_and_finds_the_planted_head() -> None:
    words = new_words(2)
    made = _row_readings.separations(FIXED, "mass", words, words, heads=True)
    real = np.concatenate(words.real)
    stacked = np.concatenate(words.values["base"])
    for layer, head in np.ndindex(2, 4):
        reading = tiny.one(made, "mass_auroc", layer=layer, head=head, side="adapted")
        assert reading.value == pytest.approx(roc_auc_score(real, stacked[:, layer, head]))
        assert (reading.value == 1) == ((layer, head) == (1, 2))
    layer = tiny.one(made, "mass_auroc", layer=0, side="base")
    assert layer.value == pytest.approx(roc_auc_score(real, stacked[:, 0].mean(-1).round(9)))
    whole = tiny.one(made, "mass_auroc", side="base")
    assert whole.value == pytest.approx(roc_auc_score(real, stacked.mean((1, 2)).round(9)))
    assert whole.n == len(real) and whole.lo <= whole.value <= whole.hi
    assert tiny.one(made, "mass_auroc", side="delta").noise == 0


def test_drawn_records_bring_all_their_words() -> None:
    words = new_words(3)
    values = [each[:, 0, 0][:, None] for each in words.values["base"]]
    drawn = [4, 4, 0, 2, 4]
    weights = np.bincount(drawn, minlength=5)[None].astype(float)
    found = _row_readings.aurocs(values, words.real, weights)[0, 0]
    pooled = np.concatenate([values[i][:, 0] for i in drawn])
    kinds = np.concatenate([words.real[i] for i in drawn])
    assert found == pytest.approx(auroc(pooled[kinds].tolist(), pooled[~kinds].tolist()))


def test_rounding_does_not_break_a_tie() -> None:
    real, values = [np.array([True, False])] * 3, [np.array([[0.3], [0.3]])] * 3
    shaken = [values[0] + np.array([[0], [noise]]) for noise in (1e-7, -1e-7, 1e-7)]
    apart = [np.array([[0.9], [0.1]])]
    for each in (values, shaken):
        found = _row_readings.aurocs(each + apart, real + real[:1], np.ones((1, 4)))
        # Of 16 pairs: 9 ties among the three, 3 + 3 + 1 for the fourth record's words.
        assert found[0, 0] == pytest.approx((9 / 2 + 7) / 16)


def test_words_without_a_value_are_left_out() -> None:
    words = new_words(4)
    values = [each[:, 0, 0][:, None].copy() for each in words.values["base"]]
    values[0][0] = np.nan
    values[3][1] = np.nan
    found = _row_readings.aurocs(values, words.real, np.ones((1, 5)))[0, 0]
    pooled, real = np.concatenate(values)[:, 0], np.concatenate(words.real)
    kept = ~np.isnan(pooled)
    assert found == pytest.approx(roc_auc_score(real[kept], pooled[kept]))


def test_rows_with_a_nan_are_neither_summed_nor_counted() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    values[1, 2, 3] = float("nan")
    member = torch.tensor([[1.0, 1, 1, 1], [0, 0, 1, 1]])
    sums, counts = reduce_rows(values, member)
    assert counts.tolist() == [[4, 3], [2, 1]]
    assert sums[0, 0].tolist() == values[0].sum(-1).tolist()
    assert sums[1, 1].tolist() == values[1, :, 2].tolist()


def test_a_set_without_absent_words_still_reads_the_rest() -> None:
    records = [replace(record, rejected=record.chosen) for record in tiny.records(3)]
    words = vocabulary("microworld")
    readings = ProbePass(tiny.new_vlm(), records, [METHOD()], words, batch_size=2).run(0)
    absent = tiny.one(readings, "alloc_image", group="absent", side="adapted")
    assert absent.n == 0 and math.isnan(absent.value)
    parted = tiny.one(readings, "alloc_image_auroc", side="adapted")
    assert parted.n == 0 and math.isnan(parted.value)
    assert tiny.one(readings, "alloc_image", group="real", side="adapted").n > 0
