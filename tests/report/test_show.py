"""One record's story, and the parts that it is told with."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mlalign.objects import vocabulary
from mlalign.report import marks, pictures
from mlalign.report.show import UnknownRecord, show
from tests.report import synthetic


def test_a_pair_is_told_whole(run: Path) -> None:
    text = show(run, "microworld-train-1/ha_dpo")
    for piece in (
        "prompt  Describe this image",
        "fact    ",
        "rejected  In this",
        "origin    builder: ha_dpo",
        "training, ha_dpo: seen at 5 steps",
        "probe attention_grounding",
    ):
        assert piece in text


def test_a_heldout_example_has_every_answer(run: Path) -> None:
    text = show(run, "microworld-heldout-2")
    assert all(f"  {label} " in text for label in ("base", *synthetic.ARMS))


def test_unknown_record_names_the_nearest(run: Path) -> None:
    with pytest.raises(UnknownRecord, match="microworld-heldout-2"):
        show(run, "microworld-heldout-222")


def test_difference_marks_whole_words_and_joins_neighbours() -> None:
    ours, theirs = marks.difference("a red cat sits.", "a big blue cat sits.")
    assert [(m.start, m.end) for m in ours] == [(2, 5)]
    assert [(m.start, m.end) for m in theirs] == [(2, 10)]


def test_marked_escapes_inside_and_outside_of_marks() -> None:
    html = marks.marked("<b>&x", [marks.Mark(0, 3, "false", '"t"'), marks.Mark(1, 2, "true")])
    assert str(html) == '<mark class="false" title="&#34;t&#34;">&lt;b&gt;</mark>&amp;x'


def test_claims_follow_the_facts() -> None:
    found = marks.claimed("a dog and a boat", {"dog"}, vocabulary("microworld"))
    assert [(m.kind, m.start) for m in found] == [("true", 2), ("false", 12)]


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_overlay_lies_over_the_view(mode: str) -> None:
    image = Image.new("RGB", (200, 100), "white")
    values = [0.0, 0.0, 0.0, 1.0]
    picture = pictures.overlaid(image, values, (2, 2), mode=mode, top=1.0, side=200)
    assert picture.size == (200, 100)
    # Hot at the bottom right of the view; pad: the view is wider than the picture is high.
    x = {"pad": 190, "crop": 140}[mode]
    hot, cold = picture.getpixel((x, 90)), picture.getpixel((5, 5))
    assert isinstance(hot, tuple) and isinstance(cold, tuple)
    assert hot[0] - hot[2] > 60
    assert cold[0] == cold[2]


def test_overlay_refuses_a_wrong_grid() -> None:
    with pytest.raises(ValueError, match="3 values on a grid of 2 x 2"):
        pictures.overlaid(Image.new("RGB", (8, 8)), [0, 0, 0], (2, 2), mode="crop", top=1)
