"""Several runs on one page: what stands beside what, and what keeps them from being compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mlalign import cli, store
from mlalign.report import beside, compare
from mlalign.report.figures import Figures
from mlalign.report.folder import NoRunFolder, Run
from mlalign.runlog import RunLog


def test_labels_and_colours_by_system(tmp_path: Path) -> None:
    runs = [write(tmp_path / name) for name in ("dpo-1", "dpo-2", "mdpo-1")]
    runs.append(write(tmp_path / "two", arms=("povid", "ha_dpo")))
    found = compare.trained([Run(run) for run in runs])
    assert [t.label for t in found] == ["dpo-1", "dpo-2", "mdpo-1", "two povid", "two ha_dpo"]
    assert [t.kind for t in found] == ["dpo", "dpo", "mdpo", "two povid", "two ha_dpo"]
    assert [t.colour for t in found] == [0, 0, 1, 2, 3]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write(tmp_path / place / "run") for place in ("x", "y")]
    assert [t.label for t in compare.trained([Run(r) for r in runs])] == ["x/run", "y/run"]


def test_before_after_and_change_of_every_probe(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a-1", gain=0.5), write(tmp_path / "b-1", gain=0.01)]
    found = compare.trained([Run(run) for run in runs])
    rows = compare.numbers(found)
    assert [h.name for h in beside.headlines(rows)] == ["blank_per_token, chosen", "first, g"]
    html = beside.table(found, rows).html
    cells = [
        re.findall(r"<td.*?</td>", row) for row in re.findall(r"<tr><th scope.*?</tr>", html, re.S)
    ]
    values = [[re.sub("<[^>]*>", " ", cell).split() for cell in row] for row in cells]
    # The known headline: base, adapted, the probe's own change with its interval.
    assert values[0][:3] == [["2.0"], ["2.5"], ["+0.50", "[0.40,", "0.60]"]]
    assert 'class="clear"' in cells[0][2]
    # Its interval holds zero.
    assert values[1][2] == ["+0.01", "[\u22120.09,", "0.11]"] and 'class="clear"' not in cells[1][2]
    # Of an unknown probe the first number; without a change of its own, adapted minus base.
    assert values[0][3:] == [["1.00"], ["3.0"], ["+2.0"]]


def test_scatter_has_a_dot_for_each_run_with_both(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a-1"), write(tmp_path / "b-1"), write(tmp_path / "c-1", chair=None)]
    found = compare.trained([Run(run) for run in runs])
    figures = Figures()
    html = beside.against(found, compare.numbers(found), figures).html
    assert figures.count == 2
    dots = re.findall(
        r"([abc]-1)\\u003cbr\\u003eblank_per_token, chosen: 0\.50 \[0\.40, 0\.60\]", html
    )
    assert set(dots) == {"a-1", "b-1"}
    assert "CHAIR_i: \\u22126.0" in html


def test_what_differs_is_said(tmp_path: Path) -> None:
    first = Run(write(tmp_path / "a-1"))
    assert compare.differences([first, Run(write(tmp_path / "b-1"))]) == []
    other = write(tmp_path / "c-1", model="other")
    store.write_text_atomic(other / "probe_set" / "records.jsonl", PROBED.replace("r0", "r9"))
    said = compare.differences([first, Run(other)])
    assert [text.partition(":")[0] for text in said] == [
        "Not the same base model as a-1",
        "Not the same probe set as a-1",
    ]


def test_command_line(tmp_path: Path) -> None:
    runs = [str(write(tmp_path / name)) for name in ("a-1", "b-1")]
    run = CliRunner().invoke
    done = run(cli.app, ["report", *runs, "--out", str(tmp_path / "both.html")])
    assert done.exit_code == 0, done.output
    assert "a-1, b-1" in (tmp_path / "both.html").read_text(encoding="utf-8")
    one = run(cli.app, ["report", runs[0]])
    assert one.exit_code == 0 and (tmp_path / "a-1" / "report.html").is_file()
    assert isinstance(run(cli.app, ["report", *runs]).exception, compare.CompareError)


def test_refusals_name_the_run(tmp_path: Path) -> None:
    first, out = write(tmp_path / "a-1"), tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    for folders, says in (
        ([first], "at least two"),
        ([first, first], "a-1 is given twice"),
        ([first, tmp_path / "empty"], "empty has nothing trained"),
    ):
        with pytest.raises(compare.CompareError, match=says):
            compare.write(folders, out)
    with pytest.raises(NoRunFolder, match="not-there"):
        compare.write([first, tmp_path / "not-there"], out)
    assert not out.exists()


def test_runs_without_probes_or_scores_give_a_page(tmp_path: Path) -> None:
    for name in ("a-1", "b-1"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text("data: {pairs: {povid: p}}", encoding="utf-8")
    made = compare.write([tmp_path / "a-1", tmp_path / "b-1"], tmp_path / "p.html")
    text = made.read_text(encoding="utf-8")
    for says in ("none of the runs was evaluated", "none of the runs was probed"):
        assert says in text


PROBED = (
    '{"id": "r0", "image": {"path": "i.png"}, "prompt": "p", "own": "o", "chosen": "c", '
    '"rejected": "r", "facts": {"objects": []}}\n'
)


def write(
    folder: Path,
    *,
    arms: tuple[str, ...] = ("povid",),
    gain: float = 0.5,
    chair: float | None = 0.02,
    model: str = "m",
) -> Path:
    """A run folder with the files that the page reads."""
    log = RunLog(folder)
    raw: dict[str, Any] = {
        "name": folder.name,
        "model": {"path": model},
        "data": {"pairs": dict.fromkeys(arms, "p")},
        "train": {"objective": "dpo"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    store.write_text_atomic(folder / "probe_set" / "records.jsonl", PROBED)
    if chair is not None:
        sides = {"before": {"halluc/chair_i": 0.08}, "after": {"halluc/chair_i": chair}}
        store.write_json_atomic(folder / "summary.json", {"builders": dict.fromkeys(arms, sides)})
    for arm in arms:
        for step in (0, 10):
            log.probe(arm, step, "image_reliance", reliance(step, gain * step / 10))
            fixed = {"step": step, "probe": "unknown", "record": "", "group": "g"}
            pair = (("first", "base", 1.0), ("first", "adapted", 3.0), ("second", "base", 9.0))
            log.probe(
                arm,
                step,
                "unknown",
                [{**fixed, "metric": m, "side": s, "value": v} for m, s, v in pair],
            )
    return folder


def reliance(step: int, gain: float) -> list[dict[str, Any]]:
    """Base 2, adapted 2 + gain, change with an interval of 0.1 either way."""
    fixed = {"step": step, "probe": "image_reliance", "metric": "blank_per_token", "record": ""}
    fixed |= {"group": "chosen"}
    return [
        {**fixed, "side": "base", "value": 2.0},
        {**fixed, "side": "adapted", "value": 2.0 + gain},
        {
            **fixed,
            "side": "delta",
            "value": gain,
            "lo": gain - 0.1,
            "hi": gain + 0.1,
            "noise": 0.005,
        },
    ]
