"""Curves over steps: what stands in a row, which seeds, and which system gets there first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlalign.report.over_steps import curve, curves, main, over_seeds, reached, table
from mlalign.report.systems import SystemsError
from tests.report.test_systems import cells, write

CHAIR = "watch/halluc/chair_i"
SLOW = {0: 0.10, 10: 0.08, 20: 0.06, 30: 0.04}
FAST = {0: 0.10, 10: 0.05, 20: 0.03, 30: 0.035}


def planted(folder: Path) -> list[Path]:
    runs = []
    for name, chairs in (("slow", SLOW), ("fast", FAST)):
        for seed in range(3):
            run = write(folder / f"{name}-w-{seed}", seed, 0.05)
            rows = [
                {"arm": "povid", "step": step, "reward": step + seed} for step in range(1, 31)
            ] + [
                {"arm": "povid", "step": step, CHAIR: value + (seed - 1) / 100}
                for step, value in chairs.items()
            ]
            with (run / "metrics.jsonl").open("a") as handle:
                handle.writelines(json.dumps(row) + "\n" for row in rows)
            runs.append(run)
    return runs


def test_a_row_holds_the_rewards_since_the_last_one(tmp_path: Path) -> None:
    found = curves(planted(tmp_path))
    assert list(found) == ["slow-w", "fast-w"] and [len(each) for each in found.values()] == [3, 3]
    first = found["slow-w"][0]
    assert "reward" not in first[0], "no step was taken before the first look"
    assert first[10]["reward"] == pytest.approx(5.5) and first[20]["reward"] == pytest.approx(15.5)
    assert first[10][CHAIR] == pytest.approx(0.07)


def test_means_are_over_the_seeds_that_have_the_step() -> None:
    seeds = [curve([{"step": s, CHAIR: v} for s, v in each]) for each in (
        [(0, 0.2), (5, 0.1), (10, 0.0)], [(0, 0.4), (10, 0.1)],
    )]  # fmt: skip
    assert over_seeds(seeds, CHAIR) == {0: [0.2, 0.4], 10: [0.0, 0.1]}
    assert reached(seeds, 0.31) == 0 and reached(seeds, 0.06) == 10
    assert reached(seeds, 0.01) is None


def test_the_table_and_who_is_there_first(tmp_path: Path) -> None:
    text = table(planted(tmp_path))
    rows, races = (part.splitlines() for part in text.split("\n\n"))
    assert cells(rows[0])[:4] == ["step", "system", "reward", "CHAIR_i %"]
    assert cells(rows[4])[:4] == ["10", "slow-w", "6.50 [5.50, 7.50]", "8.0 [7.0, 9.0]"]
    assert races == [
        "- slow-w ends at a CHAIR_i of 4.0 %, where it first is at step 30; fast-w reaches it at "
        "step 20.",
        "- fast-w ends at a CHAIR_i of 3.5 %, where it first is at step 20; slow-w does not "
        "reach it.",
    ]


def test_a_run_that_was_not_watched_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "a-w-0", 0, 0.05)
    with pytest.raises(SystemsError, match="a-w-0: no watched step of 'povid'"):
        curves([run])
    assert main([str(run)]) == 2 and "watch_every" in capsys.readouterr().err
    assert main([]) == 2 and main([str(tmp_path / "none")]) == 2
