"""The report of a made-up run: every section, nothing lost, nothing that model text can inject."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlalign.report import (
    builds,
    concepts,
    curves,
    drift,
    further,
    gallery,
    grounding,
    neurons,
    page,
    provenance,
    reliance,
    results,
    series,
)
from mlalign.report.figures import Figures
from mlalign.report.folder import NoRunFolder, Run
from mlalign.report.readings import Point
from mlalign.report.section import Section


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return page.write(run).read_text(encoding="utf-8")


def body(html: str) -> str:
    """The page without its scripts and styles."""
    return re.sub(r"<(script|style)[^>]*>.*?</\1>", "", html, flags=re.S)


def text_of(html: str, section: str) -> str:
    found = re.search(rf'<section id="{section}">(.*?)</section>', body(html), re.S)
    assert found, section
    return found[1]


def test_every_section_is_there_and_filled(html: str) -> None:
    for section in (
        "results",
        "training",
        "reliance",
        "grounding",
        "drift",
        "neurons",
        "concepts",
        "further",
        "answers",
        "looks",
        "pairs",
        "builds",
        "provenance",
    ):
        assert 'class="empty"' not in text_of(html, section), section


def test_page_is_self_contained_and_small(html: str) -> None:
    assert len(html) < 8_000_000
    assert not re.search(r'(?:src|href)="(?!data:|#)', body(html))
    assert html.count("plotly.js v") == 1


def test_verdict_names_recall_beside_the_rate(html: str) -> None:
    headline = re.search(r'class="verdict">(.*?)</p>', html, re.S)
    assert headline
    assert "CHAIR_i fell clearly in 2 of 3 arms" in headline[1]
    assert "povid \u221210.0" in headline[1]
    assert "Read the warnings on povid, rlaif_v" in headline[1]


def test_model_text_is_escaped(html: str) -> None:
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html


def test_false_and_differing_words_are_marked(html: str) -> None:
    answers = text_of(html, "answers")
    assert re.search(r'<mark class="false" title="\w+: not known[^"]*">\w+</mark>', answers)
    assert '<mark class="true"' in answers
    assert "leaves out:" in answers
    pairs = text_of(html, "pairs")
    assert '<mark class="rejected" title="object">pot</mark>' in pairs  # a segment
    assert '<mark class="rejected" title="only in rejected">pot</mark>' in pairs  # a diff


def test_pictures_of_records_and_attention(html: str) -> None:
    looks = text_of(html, "looks")
    assert looks.count('<img class="main" src="data:image/') == 6
    assert looks.count('alt="attention map, base"') == 12
    assert looks.count('alt="attention map, povid"') == 12


def test_figures_are_valid_json_with_axis_titles(html: str) -> None:
    drawn = re.findall(r'<script type="application/json" data-for[^>]*>(.*?)</script>', html, re.S)
    figures = [each for raw in drawn if "layout" in (each := json.loads(raw))]
    assert len(figures) > 40 and len(drawn) > len(figures)
    for each in figures:
        assert each["layout"]["xaxis"]["title"]["text"]


def test_unknown_probe_shows_up_by_itself(html: str) -> None:
    found = text_of(html, "further")
    assert re.search(r'<button class="pick" data-place="0"[^>]*>novelty</button>', found)
    assert "+0.50</span>" in found and "[0.47, 0.54]" in found
    # What is no number is not shown as one.
    assert "undefined" not in found and "nan" not in found


def test_long_lines_are_thinned_and_said() -> None:
    points = [Point(step, float(step), math.nan, math.nan, math.nan, 8) for step in range(101)]
    html = series.chart(Figures(), {("m", ""): {"delta": {"arm": points}}}, ["arm"], "probe")
    raw = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.S)
    assert raw
    (line,) = json.loads(raw[1])["entries"][0]["sides"]["delta"]
    assert len(line[1]) == series.MOST and line[1][0] == 0 and line[1][-1] == 100
    assert line[2] == line[1] and line[3] == [None] * series.MOST
    assert f"{series.MOST} of 101 passes are drawn" in html
    # The table is of the last pass.
    assert "<span>100</span>" in html


def test_caption_of_a_probe_is_its_first_line() -> None:
    first, whole = series.description("image_reliance")
    assert first and whole.startswith(f"{first}\n") and "blank" in whole
    assert series.description("brand_new") == ("", "")


def test_bold_is_a_change_beyond_chance_and_floor(html: str) -> None:
    rows = re.findall(r"<tr><th scope=.*?</tr>", text_of(html, "reliance"), re.S)
    own = next(row for row in rows if ">blank_per_token</button>" in row)
    cells = re.findall(r'<td(?: class="first")?><span( class="clear")?>([^<]*)</span>', own)
    # Base, then adapted and change of ha_dpo, povid, rlaif_v.
    assert cells == [
        ("", "0.80"),
        ("", "1.00"),
        (' class="clear"', "+0.20"),
        ("", "0.80"),
        ("", "0.00"),
        ("", "0.60"),
        (' class="clear"', "\u22120.20"),
    ]


def test_neurons_say_what_they_write_and_how_often_they_led(html: str) -> None:
    found = text_of(html, "neurons")
    assert found.count("4 of 4") == 3 and found.count("1 of 4") == 3 * 23
    assert '<span class="token">dogs</span><span class="token">\u2423</span>' in found
    assert "&lt;b&gt;" in found


def test_skips_and_versions_are_told(html: str) -> None:
    assert "12 \u00d7 nothing wrong in any sample" in text_of(html, "builds")
    assert "5.23.0" in text_of(html, "provenance")


@pytest.mark.parametrize(
    ("part", "make", "says"),
    [
        ("summary.json", results.section, "was not evaluated"),
        ("metrics.jsonl", curves.section, "no training was logged"),
        ("probes", grounding.section, "no probes were logged"),
        ("probes", drift.section, "no probes were logged"),
        ("probes", reliance.section, "no probes were logged"),
        ("probes", neurons.section, "no table of neurons was logged"),
        ("probes", concepts.section, "no labelled patches were logged"),
        ("probes", further.section, "no further probes were logged"),
        ("probes", gallery.looks_section, "no attention maps were logged"),
        ("eval", gallery.answers_section, "no answers were stored"),
        ("data", gallery.pairs_section, "no pairs under data/"),
        ("data", builds.section, "no pairs were built"),
        ("manifest.json", provenance.section, "were not recorded"),
    ],
)
def test_missing_part_is_said_in_one_line(
    run: Path, tmp_path: Path, part: str, make: Callable[[Run, Figures], Section], says: str
) -> None:
    without = tmp_path / "run"
    without.mkdir()
    for each in run.iterdir():
        if each.name != part:
            (without / each.name).symlink_to(each)
    assert says in make(Run(without), Figures()).empty


def test_empty_folder_gives_a_page(tmp_path: Path) -> None:
    html = page.write(tmp_path).read_text(encoding="utf-8")
    assert "has not been evaluated" in html
    assert body(html).count('class="empty"') == 13


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoRunFolder, match="give runs/<name>"):
        page.write(tmp_path / "nothing")


def test_blank_images_put_a_banner(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {blank_images: true}", encoding="utf-8")
    assert "trained on blank images" in page.write(tmp_path).read_text(encoding="utf-8")
