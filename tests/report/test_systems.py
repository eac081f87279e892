"""The ranked table over systems and seeds: means, intervals and ranks worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlalign.report.systems import SystemsError, main, table

# t(0.975, 2) / sqrt(3) = 4.302653 / 1.732051 = 2.484138: half an interval in deviations of 3 seeds.
A = (0.010, 0.020, 0.030)
B = (0.020, 0.031, 0.040)
C = (0.015, 0.015, 0.045)
RELIANCE = "probe/image_reliance/blank_per_token/chosen"
LIFT = "grounding/box_lift/real"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_means_intervals_and_ranks(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / f"{name}-{seed}", seed, value)
        for name, values in (("b-w", B), ("c-w", C), ("a-w", A))
        for seed, value in enumerate(values)
    ]
    head, _, base, *rows = table(runs).splitlines()
    assert cells(head)[:5] == ["rank", "system", "seeds", "CHAIR_i %", "recall %"]
    # Base: 0.08 in every seed, so an interval without width.
    assert cells(base)[:4] == ["", "base", "3", "8.0 [8.0, 8.0]"]
    # a: mean 2.0, deviation 1.0: 2.0 -+ 2.48, cut at 0. b: mean 3.033, deviation 1.0017. c: mean
    # 2.5, deviation 1.7321: -+ 4.30.
    assert [cells(row)[1] for row in rows] == ["a-w", "c-w", "b-w"]
    assert [cells(row)[3] for row in rows] == ["2.0 [0.0, 4.5]", "2.5 [0.0, 6.8]", "3.0 [0.5, 5.5]"]
    # a - b is -1.0, -1.1, -1.0: clear, though the intervals above overlap. a - c and b - c hold 0.
    assert [cells(row)[0] for row in rows] == ["1 (1 to 2)", "2 (1 to 3)", "3 (2 to 3)"]


def test_every_column_and_probes_before_and_after(tmp_path: Path) -> None:
    text = table([write(tmp_path / "a-w-0", 0, 0.01)])
    head, _, base, row = text.splitlines()
    assert cells(head)[3:] == [
        "CHAIR_i %",
        "recall %",
        "words",
        "clean NLL",
        "POPE acc. %",
        "yes rate %",
        "image reliance, before and after",
        "grounding lift, before and after",
    ]
    # One seed: the run's own intervals where it has them, and no rank but the first of one.
    assert cells(row)[:3] == ["1", "a-w", "1"]
    assert cells(row)[3:] == [
        "1.0 [0.4, 2.0]",
        "90.0",
        "20.5",
        "0.125",
        "75.0",
        "55.0",
        "2.00, 3.00",
        "1.20, 1.50",
    ]
    assert cells(base)[3] == "8.0"


def test_two_systems_of_one_seed_cannot_be_told_apart(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a-w-0", 0, 0.01), write(tmp_path / "b-w-0", 0, 0.5)]
    rows = table(runs).splitlines()[3:]
    assert [cells(row)[0] for row in rows] == ["1 (1 to 2)", "2 (1 to 2)"]


def test_only_common_seeds_are_compared(tmp_path: Path) -> None:
    # b's seeds 3 and 4 are far above a's 0 to 2, but no seed is common to both.
    runs = [write(tmp_path / f"a-w-{s}", s, 0.01 + s / 1000) for s in range(3)]
    runs += [write(tmp_path / f"b-w-{s}", s, 0.5 + s / 1000) for s in (3, 4)]
    rows = table(runs).splitlines()[3:]
    assert [cells(row)[0] for row in rows] == ["1 (1 to 2)", "2 (1 to 2)"]


def test_arms_and_controls_are_systems_of_their_own(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / "w-0", 0, 0.01, arms=("povid", "ha_dpo")),
        write(tmp_path / "m-w-0", 0, 0.03, arms=("povid",)),
        write(tmp_path / "m-w-0-blind", 0, 0.04, arms=("povid",), blind=True),
    ]
    labels = {cells(line)[1] for line in table(runs).splitlines()[3:]}
    assert labels == {"w/povid", "w/ha_dpo", "m-w", "m-w, blind"}


def test_runs_that_cannot_be_compared_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path / "a-w-0", 0, 0.01)
    with pytest.raises(SystemsError, match="no run folder"):
        table([])
    with pytest.raises(SystemsError, match=r"a-w-00: a-w has seed 0 twice"):
        table([first, write(tmp_path / "a-w-00", 0, 0.02)])
    with pytest.raises(SystemsError, match=r"b-w-0 and .*a-w-0 differ in eval"):
        table([first, write(tmp_path / "b-w-0", 0, 0.02, images=7)])
    with pytest.raises(SystemsError, match=r"d-w-0: povid has no halluc/chair_i"):
        table([write(tmp_path / "d-w-0", 0, None)])
    assert main([str(tmp_path / "not-there")]) == 2
    assert "not-there" in capsys.readouterr().err


def write(
    folder: Path,
    seed: int,
    chair_i: float | None,
    *,
    arms: tuple[str, ...] = ("povid",),
    images: int = 100,
    blind: bool = False,
) -> Path:
    """A run folder with the files that the table reads."""
    folder.mkdir()
    raw: dict[str, Any] = {
        "name": folder.name,
        "model": {"path": "m"},
        "data": {"pairs": dict.fromkeys(arms, "p")},
        "train": {
            "objective": "dpo",
            "learning_rate": 1e-3,
            "batch_size": 4,
            "steps": 5,
            "blank_images": blind,
        },
        "eval": {"images": images},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    after = {
        "halluc/chair_i": chair_i,
        "halluc/chair_i_ci95": [0.004, 0.02],
        "halluc/recall": 0.9,
        "halluc/length": 20.5,
        "lm/clean_caption_nll": 0.125,
        "pope/accuracy": 0.75,
        "pope/yes_rate": 0.55,
    }
    sides = {"before": {"halluc/chair_i": 0.08}, "after": after}
    summary = {"seed": seed, "builders": dict.fromkeys(arms, sides)}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows: list[dict[str, Any]] = []
    for arm in arms:
        # The pass before the first step comes first; a line without probes comes last.
        rows.append({"arm": arm, "step": 0, RELIANCE: 2.0, f"{RELIANCE}/base": 2.0, LIFT: 1.2})
        rows.append({"arm": arm, "step": 5, RELIANCE: 3.0, f"{RELIANCE}/base": 2.0})
        rows[-1] |= {LIFT: 1.5, f"{LIFT}/base": 1.2}
        rows.append({"arm": arm, "step": 5, "loss": 0.5})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines)
    return folder
