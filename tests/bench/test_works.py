"""The benchmark measures the same work on all sides, and says so when it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mlalign.bench import dpo, works
from mlalign.bench.asking import Asking
from mlalign.bench.peak import measure
from mlalign.bench.rounds import Row, alternate, row_of
from mlalign.bench.setting import Setting, new_pairs, new_vlm, questions
from mlalign.cli import app
from mlalign.estimate.geometry import read

SMALL = Setting(
    layers=2, width=64, intermediate=128, heads=4, tower_layers=2, tower_width=64, rank=4
)
KEYS = (
    "work",
    "opponent",
    "ratio_median",
    "ratio_min",
    "ratio_max",
    "ceiling",
    "loss_max_abs_diff",
    "logps_max_abs_diff",
    "grad_rel_diff",
    "peak_memory_ratio",
)


def row(**facts: float | None) -> Row:
    return row_of("w", "o", [1.0, 2.0], [3.0, 5.0], **facts)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"logps_max_abs_diff": 2e-4}, "logps_max_abs_diff"),
        ({"loss_max_abs_diff": float("nan")}, "loss_max_abs_diff"),
        ({"grad_rel_diff": 2e-3, "logps_max_abs_diff": 1e-5}, "grad_rel_diff"),
        ({"margin": 0.001}, "margin"),
        ({"logps_max_abs_diff": 1e-5, "loss_max_abs_diff": 0.0, "margin": 0.5}, ""),
    ],
)
def test_a_row_that_says_nothing_is_invalid(facts: dict, words: str) -> None:
    assert row(**facts).invalid.partition(" ")[0] == words


def test_ratios_are_taken_within_rounds() -> None:
    made = row()
    assert (made.ratio_min, made.ratio_median, made.ratio_max) == (2.5, 2.75, 3.0)


def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = alternate(sides, 2, "x")
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize(
    "setting",
    [
        SMALL.at(completions=(5, 12), pairs=2),
        pytest.param(
            SMALL.at(completions=(6, 6), image="llava_next", prefix=2900), marks=pytest.mark.long
        ),
    ],
    ids=["llava", "llava_next"],
)
def test_all_sides_do_the_same(setting: Setting) -> None:
    rows = works.dpo_rows("x", setting, cached=False, rounds=1)
    assert [r.opponent for r in rows] == ["stock", "padded"]
    for made in rows:
        assert not made.invalid and made.margin is not None and made.margin > 0.01
        assert made.loss_max_abs_diff is not None and made.loss_max_abs_diff <= 1e-4
        assert made.grad_rel_diff is not None and made.grad_rel_diff <= 1e-3


def test_token_counts_are_those_of_the_setting() -> None:
    setting = SMALL.at(completions=(7, 7), prefix=590, pairs=2)
    vlm = new_vlm(setting)
    for pair in new_pairs(setting, vlm):
        prefix, both = vlm.branch_ids(pair.prompt, [pair.chosen, pair.rejected], (336, 336))
        assert len(prefix) == 590 and [len(c) for c in both] == [7, 7]
    prefix, branches = vlm.question_ids(questions(vlm, (336, 336), 5, 20), (336, 336))
    assert {len(b) for b in branches} == {20} and prefix.count(vlm.image_token_id) == 576


def test_a_cached_reference_leaves_the_loss_as_it_was() -> None:
    setting = SMALL.at(completions=(5, 9))
    live = dpo.sides(setting, False, ("shared",))["shared"].step()
    cached = dpo.sides(setting, True, ("shared", "padded"))
    assert cached["shared"].step() == pytest.approx(live, abs=1e-6)
    assert cached["padded"].step() == pytest.approx(live, abs=1e-5)


def test_all_ways_to_ask_give_the_same() -> None:
    asked = Asking(SMALL, count=4, tokens=20)
    assert len(asked.prefix) == 600
    found = {name: call() for name, call in asked.sides().items()}
    for name, logps in found.items():
        assert (logps - found["single"]).abs().max() < 1e-4, name
    assert found["shared"].shape == (4, SMALL.vocabulary)
    assert (found["shared"][0] - found["shared"][1]).abs().max() > 1e-3


def test_the_ceiling_against_counting_tokens() -> None:
    setting = Setting(layers=2, width=256, intermediate=704, heads=4, tower_layers=1)
    side = dpo.sides(setting, False, ("shared",))["shared"]
    assert isinstance(side, dpo.Ours)
    (pair,) = side.tokenised
    geometry = read(side.trainer.vlm.core.config)
    lengths = len(pair.chosen), len(pair.rejected)
    found = works.ceiling(setting, geometry, [(len(pair.prefix), lengths)], live=True)
    # Decoder tokens alone would give 1400 / 800; head and tower, equal on both sides, lower it.
    assert 1.05 < found < 1400 / 800
    # Of a group of eight, 5600 / 1400, and nearly so where the linears are all but everything:
    # attention, 8 x 245,350 pairs / 700,700, is the rest.
    group = [(600, (100,) * 8)]
    eight = works.ceiling(setting, geometry, group, live=False)
    assert found < eight < 5600 / 1400
    decoder = replace(geometry.decoder, layers=50, width=8192, vocabulary=9)
    tower = replace(geometry.tower, flops=0.0)
    lean = works.ceiling(setting, replace(geometry, decoder=decoder, tower=tower), group, False)
    assert 3.85 < lean < 4.0


def test_peak_memory_of_a_fresh_process() -> None:
    small = SMALL.at(completions=(4, 4))
    assert measure("shared", small) > 0
    with pytest.raises(RuntimeError, match="no-such-side"):
        measure("no-such-side", small)


def test_json_and_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = row(logps_max_abs_diff=1.0)
    monkeypatch.setattr(
        works, "works", lambda _: {"good": lambda _: [row()], "bad": lambda _: [bad]}
    )
    runner, file = CliRunner(), tmp_path / "bench.json"
    small = ["--layers", "1", "--width", "64", "--tower-layers", "1", "--tower-width", "64"]
    good = runner.invoke(app, ["bench", "good", "--json", str(file), *small])
    assert good.exit_code == 0, good.output
    made = json.loads(file.read_text())
    assert all(key in made["rows"][0] for key in KEYS)
    assert made["setting"]["layers"] == 1 and made["setting"]["torch"] == torch.__version__
    both = runner.invoke(app, ["bench", "--json", str(file), *small])
    assert both.exit_code == 1 and "invalid" in both.output
    assert json.loads(file.read_text())["rows"][1]["invalid"]
    missing = runner.invoke(app, ["bench", "speed", *small])
    assert missing.exit_code != 0 and "good" in missing.output
