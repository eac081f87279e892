"""Planted truths and invariances of first_token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, cross_val_predict

from mlalign.objects import vocabulary
from mlalign.probes._pass import ProbePass
from mlalign.probes._stats import auroc
from mlalign.probes._summaries import aurocs, coordinates, separation
from mlalign.probes.first_token import METHOD, Settings, out_of_fold, sites, spread
from tests.probes import tiny

RECORDS, WIDTH = 40, 64


def planted(signal: float, turned: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Records of four words each; ``signal``: how far absent words lie from real ones along an
    axis; ``turned``: another axis in the adapted model."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(WIDTH, 2)))[0].T
    made = []
    for _ in range(RECORDS):
        absent = rng.random(4) < 0.4
        noise = rng.normal(size=(2, 4, WIDTH)) + rng.normal(size=(1, 1, WIDTH))
        sides = [noise[s] + signal * absent[:, None] * axes[s * turned] for s in (0, 1)]
        groups = np.array(["before", "after"] * 2)
        made.append({"groups": groups, "absent": absent, "base": sides[0], "adapted": sides[1]})
    return made


def read(values: list[Any], **settings: Any) -> list:
    return METHOD(Settings(**settings)).readings(0, [values], [values[:4]], None)


def test_a_planted_axis_is_found_and_the_control_stays_at_chance() -> None:
    readings = read(planted(12.0))
    for group in ("before", "after"):
        for side in ("base", "adapted"):
            found = tiny.one(readings, "absent_auroc", side=side, group=group)
            assert found.value > 0.99 and found.lo > 0.97 and found.n == 2 * RECORDS
            control = tiny.one(readings, "absent_auroc_control", side=side, group=group)
            assert abs(control.value - 0.5) < 0.08
            assert control.lo < 0.5 < control.hi < found.lo
    assert tiny.one(readings, "absent_auroc_base_probe", side="adapted", group="after").value > 0.99
    assert not tiny.pick(readings, group="question")


def test_nothing_planted_is_nothing_found() -> None:
    values, inside = [], 0
    for seed in range(5):
        readings = read(planted(0.0, seed=seed))
        for reading in tiny.pick(readings, metric="absent_auroc"):
            same = {"side": reading.side, "group": reading.group}
            control = tiny.one(readings, "absent_auroc_control", **same)
            values.append(reading.value)
            inside += control.lo <= reading.value <= control.hi
    assert len(values) == 20
    assert abs(np.mean(values) - 0.5) < 0.06 and inside >= 17


def test_a_fixed_reader_loses_what_turned_away_and_a_new_one_finds_it() -> None:
    readings = read(planted(12.0, turned=True))
    assert tiny.one(readings, "absent_auroc", side="adapted", group="before").value > 0.99
    fixed = tiny.one(readings, "absent_auroc_base_probe", side="adapted", group="before")
    assert fixed.value < 0.75


def test_scores_are_those_of_ridge_on_the_states_themselves() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(60, WIDTH)) + 5
    absent = rng.random(60) < 0.5
    records = np.repeat(np.arange(20), 3)
    settings = Settings(folds=4, penalty=3.0)
    scores = out_of_fold(states, states, absent[:, None], records, settings)[:, 0]
    folds = GroupKFold(4)
    labels = np.where(absent, 1.0, -1.0)
    known = cross_val_predict(Ridge(alpha=3.0), states, labels, groups=records, cv=folds)
    for _, test in folds.split(states, groups=records):
        # Equal but for the threshold, one number per fold.
        assert np.ptp(scores[test] - known[test]) < 1e-9
    # What the readings do first: fewer dimensions and a scale of one.
    points = coordinates(states)
    points = points / spread(points)
    wide = states / np.sqrt(states.var(0).sum())
    small, large = (out_of_fold(s, s, absent[:, None], records, settings) for s in (points, wide))
    np.testing.assert_allclose(small, large, atol=1e-9)


def test_the_base_does_not_depend_on_the_adapted_model() -> None:
    one, other = planted(2.0), planted(2.0)
    for record in other:
        record["adapted"] = 100 * record["adapted"] + 7
    for metric in ("absent_auroc", "absent_auroc_control"):
        values = [tiny.one(read(v), metric, side="base", group="after").value for v in (one, other)]
        assert values[0] == values[1]


def test_one_class_and_one_record_are_no_number() -> None:
    values = planted(1.0)
    for record in values:
        record["absent"] = np.zeros(4, dtype=bool)
    for readings in (read(values), read([]), read(planted(1.0)[:1])):
        assert readings
        assert all(r.n == 0 and math.isnan(r.value) for r in readings)


def test_states_are_of_the_rows_that_write_and_have_read_the_word() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    probes = tiny.new_pass(vlm, [METHOD()])
    item = probes._batches[0].items[1]
    kept: list[Any] = []

    class Spy(METHOD):  # type: ignore[misc,valid-type]
        def compare(self, *args: Any) -> list[Any]:
            found = super().compare(*args)
            kept.extend(found)
            return found

    probes = tiny.new_pass(vlm, [Spy()])
    probes.run(0)
    value = kept[1]
    found = sites(item, 8)
    assert [site[0] for site in found] == value["groups"].tolist()
    assert {"before", "after"} == set(value["groups"]) and len(set(value["absent"])) == 2
    for row, (group, completion, token, _) in enumerate(found):
        ids = torch.tensor([item.prefix + item.completions[completion]])
        with torch.no_grad():
            states = vlm.core.model(
                input_ids=ids, pixel_values=item.image.tensors["pixel_values"]
            ).last_hidden_state[0]
        expected = states[len(item.prefix) + token - 1]
        mine = torch.from_numpy(value["adapted"][row])
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(mine, states[len(item.prefix) + token], atol=0.1)
        mentions = item.mentions[completion]
        at = [m.tokens[0] if group == "before" else m.tokens[-1] + 1 for m in mentions]
        assert token in at


def test_yes_no_records_are_read_at_their_first_response_token() -> None:
    records = [
        replace(
            record,
            own="Yes.",
            chosen=("Yes.", "No.")[n % 2],
            rejected=("No.", "Yes.")[n % 2],
            facts=replace(record.facts, answer=("Yes.", "No.")[n % 2]),
        )
        for n, record in enumerate(tiny.records(6))
    ]
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    probes = ProbePass(vlm, records, [METHOD()], vocabulary("microworld"), 2)
    readings = probes.run(0)
    assert tiny.one(readings, "absent_auroc", side="base", group="question").n == 6
    assert tiny.one(readings, "absent_auroc", side="base", group="before").n == 0
    found = [site for item in probes._batches[0].items for site in sites(item, 8)]
    assert found == [("question", 0, 0, False), ("question", 0, 0, True)]


def test_batches_do_not_matter_and_the_floor_is_small() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), count=6, batch_size=size) for size in (1, 6))
    for one, other in zip(alone, together, strict=True):
        assert (one.metric, one.side, one.group, one.n) == (
            other.metric, other.side, other.group, other.n,
        )  # fmt: skip
        assert one.value == pytest.approx(other.value, abs=1e-6, nan_ok=True)
    floor = tiny.one(together, "absent_auroc_base_probe", side="adapted", group="after")
    assert floor.noise < 0.02 and floor.n > 12


def test_what_is_not_finite_does_not_break_the_rest() -> None:
    values = planted(12.0)
    values[3]["adapted"][1, 5] = np.nan
    found = tiny.one(read(values), "absent_auroc", side="base", group="after")
    assert found.value > 0.95 and found.n == 2 * (RECORDS - 1)


def test_absent_words_score_high() -> None:
    values = planted(12.0)
    states = np.concatenate([v["base"] for v in values])
    absent = np.concatenate([v["absent"] for v in values])
    records = np.repeat(np.arange(RECORDS), 4)
    scores = out_of_fold(states, states, absent[:, None], records, Settings())[:, 0]
    assert scores[absent].mean() > 0 > scores[~absent].mean()


def test_separation_is_scikit_learn_s_auroc() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 40).astype(float)
    labels = rng.random(40) < 0.4
    known = auroc(scores[labels].tolist(), scores[~labels].tolist())
    assert aurocs(scores[:, None], labels[:, None])[0] == pytest.approx(known)
    part = np.where(np.arange(40) < 25, scores, np.nan)
    found = aurocs(np.stack([part, part], 1), np.stack([labels, labels & False], 1))
    known_part = auroc(part[:25][labels[:25]].tolist(), part[:25][~labels[:25]].tolist())
    assert found[0] == pytest.approx(known_part) and math.isnan(found[1])
    split = np.array_split(np.arange(40), 8)
    high, low = ([scores[i][labels[i] == kind].tolist() for i in split] for kind in (True, False))
    value, lower, upper = separation(high, low)
    assert value == pytest.approx(known) and lower < known < upper
    # The interval is that of drawing whole records again.
    drawn = []
    for _ in range(200):
        again = rng.integers(0, 8, 8)
        both = np.concatenate([split[i] for i in again])
        drawn.append(aurocs(scores[both, None], labels[both, None])[0])
    limits = np.nanpercentile(drawn, [2.5, 97.5])
    assert abs(lower - limits[0]) < 0.07 and abs(upper - limits[1]) < 0.07
    assert all(math.isnan(v) for v in separation([[1.0, math.nan]], [[0.0]]))
