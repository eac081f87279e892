"""The top neurons of several runs, from planted sets, against random sets of the same size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlalign.report import compare, overlaps
from mlalign.report.folder import Run
from mlalign.runlog import RunLog
from tests.report.test_compare import write

TOTAL, SIZE = 400, 20
WIDTH = 100


def listed(folder: Path, first: int, step: int, size: int = SIZE, total: bool = True) -> None:
    """A set of ``size`` neurons that begins at flat number ``first``."""
    log = RunLog(folder)
    rows = [
        {"step": step, "rank": n, "score": 1.0, "written": ["a"]}
        | dict(zip(("layer", "neuron"), divmod(first + n, WIDTH), strict=True))
        for n in range(size)
    ]
    log.probe("povid", step, "neurons", rows)
    fixed = {"step": step, "probe": "top_drifted", "side": "delta", "record": ""}
    counts = {"unread": 0.0, **({"total": float(TOTAL)} if total else {})}
    log.probe(
        "povid",
        step,
        "top_drifted",
        [{**fixed, "metric": k, "value": v} for k, v in counts.items()],
    )


def runs(tmp_path: Path) -> list[Path]:
    """Seeds of a share all but 5; b begins 10 later; an earlier pass of a-1 held others."""
    folders = [write(tmp_path / name) for name in ("a-1", "a-2", "b-1")]
    listed(folders[0], 300, step=5)
    for folder, first in zip(folders, (95, 100, 110), strict=True):
        listed(folder, first, step=10)
    return folders


def found(folders: list[Path]) -> tuple[list[overlaps.Overlap], int]:
    trained = compare.trained([Run(folder) for folder in folders])
    return overlaps.overlaps(trained, compare.numbers(trained))


def test_overlap_of_seeds_and_of_systems(tmp_path: Path) -> None:
    each, apart = found(runs(tmp_path))
    assert apart == 0 and [o.kinds for o in each] == [("a", "a"), ("a", "b"), ("a", "b")]
    assert [o.value for o in each] == pytest.approx([15 / 25, 5 / 35, 10 / 30])
    assert all(o.total == TOTAL and o.sizes == (SIZE, SIZE) for o in each)


def test_the_page_shows_them_beside_chance(tmp_path: Path) -> None:
    html = compare.html([Run(folder) for folder in runs(tmp_path)])
    assert "a, seed against seed</td><td>1</td><td>20</td><td>0.600</td>" in html
    assert "a against b</td><td>2</td><td>20</td><td>0.238 [0.143, 0.333]</td>" in html
    mean, low, high = overlaps.by_chance(SIZE, SIZE, TOTAL)
    assert f"<td>{mean:.3f} [{low:.3f}, {high:.3f}]</td>" in html


@pytest.mark.parametrize("sizes", [(20, 20), (20, 7), (290, 395)])
def test_chance_is_what_random_sets_give(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(1500):
        one, other = (set(rng.permutation(TOTAL)[:size].tolist()) for size in sizes)
        drawn.append(len(one & other) / len(one | other))
    mean, low, high = overlaps.by_chance(*sizes, TOTAL)
    assert mean == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 1500**0.5)
    assert np.mean([low <= value <= high for value in drawn]) >= 0.95
    assert low < mean < high <= 1


def test_other_models_and_runs_without_sets_are_left_out(tmp_path: Path) -> None:
    folders = runs(tmp_path)
    other, bare = write(tmp_path / "c-1", model="other"), write(tmp_path / "d-1")
    listed(other, 100, step=10)
    each, apart = found([*folders, other, bare])
    assert len(each) == 3 and apart == 3
    assert "3 pairs of different base models" in compare.html([Run(f) for f in [*folders, other]])
    alone = compare.trained([Run(f) for f in (folders[0], bare)])
    section = overlaps.section(alone, compare.numbers(alone))
    assert "fewer than two runs" in section.empty


def test_without_the_model_s_size_there_is_no_control(tmp_path: Path) -> None:
    folders = [write(tmp_path / name) for name in ("a-1", "a-2")]
    for folder in folders:
        listed(folder, 0, step=10, total=False)
    html = compare.html([Run(folder) for folder in folders])
    assert f"<td>1.000</td><td>{overlaps.DASH}</td>" in html
