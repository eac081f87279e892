"""The coloured mask is the one that training uses, and can be read without colour."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from mlalign.data.collate import tokenise
from mlalign.sections import ModelSection
from mlalign.validate.examine import examine
from mlalign.validate.model import empty_vlm
from mlalign.validate.sample import Sample, sample_of
from mlalign.validate.show import show
from tests.train.pairs import make_pairs
from tests.validate import planted


@pytest.fixture(scope="module")
def sampled(weightless: Path) -> Sample:
    vlm, _ = empty_vlm(ModelSection(path=str(weightless)), "recipe")
    assert vlm is not None
    (made,), _ = tokenise(vlm, make_pairs(2)[1:], None)
    return sample_of(vlm, made)


def test_loss_is_on_the_completion_and_its_end_token_only(sampled: Sample) -> None:
    pair = make_pairs(2)[1]
    for text, spans in ((pair.chosen, sampled.chosen), (pair.rejected, sampled.rejected)):
        assert [span.loss for span in spans] == [True]
        # The word-level decoder writes the blank before the first word.
        assert spans[0].text.strip() == f"{text}</s>"
    assert not any(span.loss for span in sampled.prompt)


def test_image_tokens_are_one_mark_in_the_prompt(sampled: Sample) -> None:
    before, image, after = sampled.prompt
    assert image.image and image.tokens == 36 and image.shown == "[36 image tokens]"
    assert "<image>" not in before.text + after.text
    assert make_pairs(2)[1].prompt in after.text and after.text.endswith("<|assistant|>")


def shown(folder: Path, model: Path, width: int, *, coloured: bool) -> str:
    rows = planted.clean_rows(folder, 8)
    rows[2] |= {"chosen": " ", "id": "a-record-with-a-name-longer-than-most-of-them-0123456789"}
    rows[4]["images"] = ["gone.png"]
    file = planted.write(folder / "pairs.jsonl", rows)
    out = examine(
        planted.recipe(folder / "recipe.yaml", file), [f"model.path={model}"], runs=folder
    )
    text = io.StringIO()
    console = Console(
        file=text, width=width, force_terminal=coloured, no_color=not coloured, highlight=False
    )
    show(out, console, limit=1)
    return text.getvalue()


@pytest.mark.parametrize("width", [60, 100])
def test_it_fits_narrow_and_wide_terminals(width: int, tmp_path: Path, weightless: Path) -> None:
    text = shown(tmp_path, weightless, width, coloured=False)
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    chosen = make_pairs(1)[0].chosen
    assert f"{chosen}</s>»" in flat and "[36 image tokens]" in flat
    for words in ("chosen: empty", "gone.png", "2 faults", "language_model q_proj", "total"):
        assert words in flat, words
    # Nothing is cut to an ellipsis.
    assert "\u2026" not in text


def test_colour_marks_what_carries_loss(tmp_path: Path, weightless: Path) -> None:
    text = shown(tmp_path, weightless, 400, coloured=True)
    pair = make_pairs(1)[0]
    line = next(line for line in text.splitlines() if f"{pair.chosen}</s>" in line)
    opening = line.index("\x1b[32m")
    assert opening < line.index(pair.chosen) < line.index("\x1b[0m", opening)
    assert "«" not in text
    prompt = next(line for line in text.splitlines() if "[36 image tokens]" in line)
    assert "\x1b[2m" in prompt and "\x1b[32m" not in prompt
