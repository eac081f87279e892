"""The section of rewards: every term, held-out looks beside them, marked steps drawn and told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlalign import store
from mlalign.report import page, rewards
from mlalign.report.figures import Figures
from mlalign.report.folder import Run
from mlalign.runlog import RunLog
from tests.report.test_browser import NARROW, WIDE, Opened, browser

__all__ = ["browser"]
STEPS, EVERY, FALLS_AT = 40, 10, 30
"""From ``FALLS_AT`` on, what the gamed arm says is worse."""
TERMS = ("object_checker", "coverage")


def write_run(folder: Path, *, watched: bool = True) -> Path:
    """Two arms: "honest", and "gamed", whose reward rises while recall and length fall."""
    log = RunLog(folder)
    store.write_text_atomic(folder / "recipe.yaml", "name: rl\ndata: {builders: []}\n")
    for arm in ("honest", "gamed"):
        for step in range(0, STEPS + 1, EVERY):
            worse = arm == "gamed" and step >= FALLS_AT
            if watched:
                look = {
                    "halluc/chair_i": 0.2 - 0.004 * step,
                    "halluc/recall": 0.4 if worse else 0.9,
                    "halluc/length": 8.0 if worse else 24.0,
                    "lm/clean_caption_nll": 0.5 + 0.01 * step,
                }
                values = {f"watch/{key}": value for key, value in look.items()}
                log.metrics(arm, step, {**values, "watch/reward_hacking": float(worse)})
            if worse and watched:
                fell = ["recall 0.900 to 0.400", "length 24.0 to 8.0 words"]
                log.event(arm, "reward hacking", step=step, rise=0.1 * step, fell=fell)
        for step in range(1, STEPS + 1):
            terms = {f"rewards/{name}/mean": 0.01 * step - 1 for name in TERMS}
            counts = {"rewards/coverage/nothing": 0.0, "rewards/margins": 1.0}
            log.metrics(arm, step, {"loss": 0.0, "reward": 0.02 * step, **terms, **counts})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "rl")


def plots(html: str) -> dict[str, Any]:
    """Title -> figure."""
    title, data = r"<figcaption>(.*?) <span>", r"json\" data-for[^>]*>(.*?)</script>"
    found = re.findall(f"{title}.*?{data}", html, re.S)
    return {title: json.loads(raw) for title, raw in found}


def test_reward_terms_and_looks_are_drawn_with_their_marks(run: Path) -> None:
    made = rewards.section(Run(run), Figures())
    assert made is not None
    drawn = plots(made.html)
    titles = ["Reward", "object checker", "coverage", "CHAIR_i", "recall", "length", "clean NLL"]
    assert list(drawn) == titles
    for title, figure in drawn.items():
        lines = {trace["name"]: trace for trace in figure["data"] if trace.get("name")}
        assert set(lines) == {"honest", "gamed", "marked"}, title
        assert lines["marked"]["x"] == [30, 40]
        at = lines["gamed"]["x"].index(30)
        assert lines["marked"]["y"][0] == lines["gamed"]["y"][at]
        assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [30, 40]
    recall = {t["name"]: t for t in drawn["recall"]["data"]}
    assert recall["gamed"]["y"] == pytest.approx([90.0, 90.0, 90.0, 40.0, 40.0])
    assert recall["gamed"]["x"] == [0, 10, 20, 30, 40]
    reward = {t["name"]: t for t in drawn["Reward"]["data"] if t.get("name")}
    assert reward["honest"]["customdata"] == pytest.approx([0.02 * s for s in range(1, 41)])


def test_marked_steps_are_listed_with_what_fell(run: Path) -> None:
    made = rewards.section(Run(run), Figures())
    assert made is not None
    rows = re.findall(r"<tr>(.*?)</tr>", made.html, re.S)[1:]
    assert [re.findall(r"<td>(?:<span[^>]*>)?([^<]*)", row) for row in rows] == [
        ["gamed", "30", "+3.000", "recall 0.900 to 0.400; length 24.0 to 8.0 words"],
        ["gamed", "40", "+4.000", "recall 0.900 to 0.400; length 24.0 to 8.0 words"],
    ]
    (warning,) = rewards.warnings(Run(run))
    assert "reward of gamed rose" in warning and "step 30, 40 (at 40: recall 0.900" in warning


def test_a_step_that_a_resumed_run_no_longer_marks_is_not_listed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rl")
    RunLog(folder).rewind("gamed", 30)
    RunLog(folder).metrics("gamed", 40, {"watch/reward_hacking": 0.0})
    assert [each.step for each in rewards.marked(Run(folder))] == [30]


def test_a_mark_without_its_event_is_still_a_mark(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rl")
    (folder / "events.jsonl").unlink()
    found = rewards.marked(Run(folder))
    assert [(each.step, each.rise, each.fell) for each in found] == [(30, None, ()), (40, None, ())]
    assert "recall or length fell" in rewards.warnings(Run(folder))[0]
    made = rewards.section(Run(folder), Figures())
    assert made is not None and made.html.count("<td>\u2013</td>") == 4


def test_runs_without_looks_and_without_rewards(run: Path, tmp_path: Path) -> None:
    made = rewards.section(Run(write_run(tmp_path / "rl", watched=False)), Figures())
    assert made is not None and "watch_every: 0" in made.html
    assert list(plots(made.html)) == ["Reward", "object checker", "coverage"]
    log = RunLog(tmp_path / "dpo")
    log.metrics("arm", 1, {"loss": 0.6, "rewards/margins": 0.1, "rewards/chosen": 0.2})
    assert rewards.section(Run(tmp_path / "dpo"), Figures()) is None
    assert '<section id="rewards">' not in page.write(tmp_path / "dpo").read_text(encoding="utf-8")


def test_in_a_browser_crosses_are_seen_and_nothing_sticks_out(
    run: Path, browser: Any, tmp_path: Path
) -> None:
    opened = Opened(browser, page.write(run, tmp_path / "report.html"), NARROW)
    assert "reward of gamed rose" in opened.page.locator(".banner").inner_text()
    opened.page.evaluate("document.querySelectorAll('.figure[id]').forEach(mlalign.draw)")
    section = opened.page.locator("#rewards")
    section.locator(".js-plotly-plot").nth(6).wait_for()
    # Two crosses in each of seven figures.
    assert section.locator(".trace.scatter .point[style*='179, 52, 27']").count() == 14
    for width in (NARROW, WIDE):
        opened.page.set_viewport_size({"width": width, "height": 900})
        wide = opened.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1] == width
    assert opened.said == []
