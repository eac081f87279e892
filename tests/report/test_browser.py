"""The pages in a real browser: what moves when a slider, a choice or a heading is touched."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlalign.report import compare, page
from tests.report.readings import STEPS, head_value

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDE, NARROW = 1366, 390
PLOTS = "box => [...box.querySelectorAll('.js-plotly-plot')].map(p => p.data[0])"


class Opened:
    """A page in the browser, and what its console said."""

    def __init__(self, browser: Any, file: Path, width: int) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(file.as_uri())

    def widget(self, where: str) -> Any:
        """The first box of this kind, drawn."""
        box = self.page.locator(where).first
        box.scroll_into_view_if_needed()
        box.locator(".js-plotly-plot, .cells").first.wait_for()
        return box

    def plots(self, box: Any) -> list[dict[str, Any]]:
        """First trace of every plot of a widget."""
        return box.evaluate(PLOTS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    with sync.sync_playwright() as started:
        # Chromium refuses to run its sandbox as root, as containers do.
        made = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def report(run: Path, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page.write(run, tmp_path_factory.mktemp("pages") / "report.html")


@pytest.fixture(scope="module")
def opened(browser: Any, report: Path) -> Opened:
    return Opened(browser, report, WIDE)


def test_slider_moves_the_map_of_heads(opened: Opened) -> None:
    box = opened.widget("#grounding .headmap")
    before = opened.plots(box)
    slide(box, 2)
    base, adapted, change = opened.plots(box)
    for layer, head in ((0, 0), (3, 7), (2, 5)):
        at, moved = head_value(0.3, 0.15, layer, head, STEPS // 2)
        assert base["z"][layer][head] == pytest.approx(at, abs=1e-4)
        assert change["z"][layer][head] == pytest.approx(moved, abs=1e-4)
        assert adapted["z"][layer][head] == pytest.approx(at + moved, abs=1e-4)
    assert base["z"] == before[0]["z"] and change["z"] != before[2]["z"]
    assert "step 60, layer 3, head 7" in change["text"][3][7]
    assert "noise floor 0.002" in change["text"][3][7]
    assert box.locator("figcaption").nth(1).inner_text() == "adapted, step 60"
    # Colours mean the same at every step.
    assert change["zmax"] == before[2]["zmax"] and adapted["zmax"] == before[1]["zmax"]


def test_choices_switch_the_map_of_heads(opened: Opened) -> None:
    box = opened.widget("#grounding .headmap")
    slide(box, 2)
    choose(box, "reading", "attention grounding: box_lift, real")
    at, moved = head_value(1.4, 1.1, 3, 0, STEPS // 2)
    assert opened.plots(box)[1]["z"][3][0] == pytest.approx(at + moved, abs=1e-3)
    # A probe that the report does not know, with a change alone, and its interval.
    choose(box, "reading", "brand new: pattern")
    assert box.locator("figure:visible").count() == 1
    text = box.locator(".js-plotly-plot:visible").evaluate("p => p.data[0].text[0][7]")
    assert "0.07 [" in text and "change, step 60" in text
    choose(box, "reading", "attention grounding: image_mass, real")


def test_hover_shows_value_and_interval(opened: Opened) -> None:
    box = opened.widget("#grounding .headmap")
    slide(box, 4)
    box.locator(".nsewdrag").nth(2).hover()
    assert re.search(r"change, step 120, layer \d, head \d", hovered(opened))
    chart = opened.widget("#reliance .series")
    chart.locator(".scatterlayer .point").last.hover(force=True)
    assert re.search(r"step \d+[^[]*\[.*n = 40.*noise floor 0\.004", hovered(opened))


def test_layers_over_steps_follow_metric_and_group(opened: Opened) -> None:
    box = opened.widget("#drift .layermap")
    assert opened.plots(box)[0]["z"][2][4] == pytest.approx(0.4 * 0.3 * 0.9 + 0.002, abs=1e-4)
    choose(box, "group", "response")
    shown = opened.plots(box)[0]
    assert shown["x"] == ["0", "30", "60", "90", "120"]
    assert shown["z"][2][4] == pytest.approx(0.4 * 0.9 + 0.002, abs=1e-4)
    assert re.search(r"layer 2, step 120<br>0\.362 \[0\.32\d, 0\.39\d\]", shown["text"][2][4])
    choose(box, "metric", "lora_norm")
    choose(box, "group", "mlp.down_proj")
    assert opened.plots(box)[0]["z"][3][4] == pytest.approx(0.05 * 4 / 3, abs=1e-4)


def test_row_of_the_table_is_drawn(opened: Opened) -> None:
    box = opened.widget("#reliance .series")
    row = opened.page.locator("#reliance .series-block").first.locator("button.pick").nth(4)
    row.click()
    assert row.get_attribute("aria-pressed") == "true"
    assert box.locator("figcaption").first.inner_text() == "swapped_per_token, chosen"
    curves = box.locator(".js-plotly-plot").first.evaluate("p => p.data.filter(t => t.text)")
    assert [c["name"] for c in curves] == ["base", "ha_dpo", "povid", "rlaif_v"]
    assert curves[1]["y"] == pytest.approx([0.8, 0.85, 0.9, 0.95, 1.0])


def test_neurons_are_sorted_and_found(opened: Opened) -> None:
    panel = opened.page.locator("#neurons .panel").first
    panel.scroll_into_view_if_needed()
    column = "rows => rows.filter(r => !r.hidden).map(r => Number(r.cells[{}].dataset.sort))"
    rows = panel.locator("tbody tr")
    assert rows.evaluate_all(column.format(2))[0] == pytest.approx(1.0)
    head = panel.locator("th", has_text="neuron")
    head.click()
    found = rows.evaluate_all(column.format(1))
    assert found == sorted(found, reverse=True) and len(set(found)) == 24
    head.locator("button").click()
    assert rows.evaluate_all(column.format(1)) == found[::-1]
    assert head.get_attribute("aria-sort") == "ascending"
    panel.locator("input").fill("dog")
    assert rows.evaluate_all(column.format(1)) == [7]
    assert "1 found" in panel.inner_text()
    assert "4 of 4" in rows.first.inner_text()
    panel.locator("input").fill("")


def test_patches_follow_image_layer_and_word(opened: Opened) -> None:
    box = opened.widget("#concepts .concepts")
    words = "views => views.map(v => [...v.querySelectorAll('span')].map(s => s.dataset.word))"
    base, aligned = box.locator(".cells").evaluate_all(words)
    name = next(word for word in aligned if word != "sky")
    assert (base.count(name), aligned.count(name)) == (8, 24)
    assert box.locator(".cells span").first.inner_text() == "sky"
    picture = box.locator("img").first.get_attribute("src")
    choose(box, "image", "microworld-train-2/ha_dpo")
    assert box.locator("img").first.get_attribute("src") != picture
    slide(box, 0)
    assert box.locator("figcaption").last.inner_text() == "aligned by ha_dpo, layer 2"
    choose(box, "show", "p of unicorn (not there)")
    box.locator(".cells span").nth(8).click()
    assert box.locator(".told").inner_text() == "row 1, column 1: unicorn, p = 0.01"


def test_nothing_sticks_out_and_nothing_fails(opened: Opened, browser: Any, report: Path) -> None:
    check(opened)
    check(Opened(browser, report, NARROW))


def test_runs_side_by_side(browser: Any, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy-1")
    made = Opened(browser, compare.write([run, tmp_path / "copy-1"], tmp_path / "p.html"), WIDE)
    table = made.page.locator("#scores tbody")
    assert table.locator("tr").count() == 6
    # The second heading of the first metric: CHAIR_i after training, worst first.
    made.page.locator("#scores thead button").nth(2).click()
    assert table.locator("tr").first.locator("td").nth(1).inner_text().startswith("20.0")
    check(made)
    made.page.set_viewport_size({"width": NARROW, "height": 800})
    check(made)


def check(made: Opened) -> None:
    """Every tab opened, every figure drawn: no word on the console, no sideways scrolling."""
    made.page.evaluate(
        "() => { document.querySelectorAll('.tabs button').forEach(b => b.click());"
        "document.querySelectorAll('details').forEach(d => { d.open = true; });"
        "document.querySelectorAll('.figure[id]').forEach(mlalign.draw); }"
    )
    made.page.wait_for_timeout(200)
    wide = made.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1]
    drawn = made.page.evaluate("document.querySelectorAll('.figure[id][data-drawn]').length")
    assert drawn > 10
    assert made.said == []


def choose(box: Any, label: str, option: str) -> None:
    choice = box.locator("label.choice", has=box.page.locator("select"))
    choice.filter(has_text=re.compile(rf"^{label} ")).locator("select").select_option(label=option)


def slide(box: Any, place: int) -> None:
    box.locator("input[type=range]").fill(str(place))


def hovered(opened: Opened) -> str:
    opened.page.locator(".hoverlayer .hovertext").first.wait_for()
    return " ".join(opened.page.locator(".hoverlayer .hovertext").all_text_contents())
