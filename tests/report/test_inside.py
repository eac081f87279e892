"""What went with the fall of CHAIR_i: changes, correlations and their kinds, from planted runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from mlalign.report.inside import interval, main, outcomes, spearman, table
from tests.report.test_systems import LIFT, RELIANCE, cells, write

DRIFT = "drift/rms/response"
SYSTEMS = {"a": 0.01, "b": 0.03, "c": 0.05, "d": 0.07}
"""CHAIR_i after training; 0.08 before it."""


def planted(folder: Path, *, probed: bool = True) -> list[Path]:
    """Between systems reliance rises with the fall; over the seeds of one it falls with it."""
    runs = []
    for place, (name, chair) in enumerate(SYSTEMS.items()):
        for seed in range(3):
            run = write(folder / f"{name}-w-{seed}", seed, chair - seed / 1000)
            row = {
                "arm": "povid.probed" if probed else "povid",
                "step": 6,
                RELIANCE: 2.0 + (3 - place) - seed / 10,
                f"{RELIANCE}/base": 2.0,
                DRIFT: 0.5,
            }
            with (run / "metrics.jsonl").open("a") as handle:
                handle.write(json.dumps(row) + "\n")
            runs.append(run)
    return runs


def test_changes_are_after_minus_base_and_the_probed_arm_wins(tmp_path: Path) -> None:
    found = outcomes(planted(tmp_path))
    assert [o.system for o in found[:4]] == ["a-w", "a-w", "a-w", "b-w"]
    assert found[1].fall == pytest.approx(100 * (0.08 - 0.009))
    # 3.0 and lift stand in training's lines, which are passed over.
    assert found[1].changes == pytest.approx({RELIANCE: 2.9, DRIFT: 0.5})


def test_training_s_last_reading_stands_where_nothing_was_probed_later(tmp_path: Path) -> None:
    (outcome,) = outcomes([write(tmp_path / "a-w-0", 0, 0.01)])
    assert outcome.changes == pytest.approx({RELIANCE: 1.0, LIFT: 0.3})


def test_two_kinds_of_correlation(tmp_path: Path) -> None:
    text = table(planted(tmp_path))
    first, second = text.split("\n\n")
    rows = [cells(line) for line in first.splitlines()]
    assert rows[0] == ["system", "CHAIR_i, fall in points", "reliance, blank", "drift, response"]
    assert [row[0] for row in rows[2:]] == ["a-w", "b-w", "c-w", "d-w"]
    assert rows[2][1:3] == ["+7.1 [+7.0, +7.2]", "+2.900 [+2.800, +3.000]"]
    reliance, drift = (cells(line) for line in second.splitlines()[2:])
    assert reliance[:2] == ["reliance, blank", "12"]
    assert reliance[2].startswith("+1.00") and float(reliance[3].split()[0]) < -0.9
    assert drift[2:] == ["does not vary", "does not vary"]


def test_few_runs_say_so(tmp_path: Path) -> None:
    row = cells(table([write(tmp_path / "a-w-0", 0, 0.01)]).splitlines()[-1])
    assert row[2:] == ["too few", "too few"]


def test_correlation_and_interval() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 3.0, 2.0, 5.0, 4.0, 6.0]
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    low, high = interval(x, y)
    assert low < spearman(x, y) <= high <= 1 and high - low > 0.1
    assert interval(x, y) == (low, high)
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) != spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])


def test_runs_without_probes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "a-w-0", 0, 0.01)
    (run / "metrics.jsonl").write_text("")
    assert main([str(run)]) == 2
    assert "mlalign probe" in capsys.readouterr().err
