"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: from an image's size to tokens, positions and boxes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from
from tests.models import exact, qwen

SIZES = ((96, 96), (160, 84))


@pytest.fixture(scope="module", params=list(qwen.FAMILIES))
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return load_vlm_from(qwen.FAMILIES[request.param](folder), dtype="float32")


@pytest.fixture
def stock(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    return qwen.stock_processor(vlm, monkeypatch)


def test_ids_are_the_stock_processors(vlm: VLM, stock: Any) -> None:
    for size in (*SIZES, (64, 64), (30, 300), (1000, 700), (57, 41)):
        image = exact.picture(*size, seed=0)
        wanted = stock(
            images=[image], text=[qwen.prompt_text(stock, "Is it?")], return_tensors="pt"
        )
        assert vlm.prefix_ids("Is it?", size) == wanted["input_ids"][0].tolist()
        rows, columns = vlm.grid(size)
        assert wanted["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]


def test_an_image_that_is_not_resized(
    vlm: VLM, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm.processor.image_processor, "do_resize", False)
    side = 2 * vlm.processor.image_processor.patch_size
    size = (7 * side, 6 * side)
    wanted = stock(
        images=[Image.new("RGB", size)], text=[qwen.prompt_text(stock, "No.")], return_tensors="pt"
    )
    assert vlm.prefix_ids("No.", size) == wanted["input_ids"][0].tolist()
    assert vlm.grid(size) == (6, 7)


def test_prefix_positions_follow_the_published_rule(vlm: VLM) -> None:
    made = exact.case(vlm, SIZES)
    for prefix, image in zip(made.prefixes, made.inputs, strict=True):
        rows, columns = vlm.grid(image.size)
        start = prefix.index(vlm.image_token_id)
        wanted = [[i, i, i] for i in range(start)]
        wanted += [[start, start + r, start + c] for r in range(rows) for c in range(columns)]
        after = start + max(rows, columns)
        wanted += [[after + i] * 3 for i in range(len(prefix) - start - rows * columns)]
        assert vlm.family.positions(vlm.core, prefix, image).T.tolist() == wanted


def test_a_box_is_where_its_pixels_went(vlm: VLM) -> None:
    """Painted on an image that keeps its size, a box changes the patches of its tokens only."""
    side = 2 * vlm.processor.image_processor.patch_size
    size = (5 * side, 3 * side)
    plain = Image.new("RGB", size, (10, 10, 10))
    boxes = ((0, 0, 1, 1), (side, 0, 2 * side, side), (3, side - 1, 2 * side + 1, 2 * side + 1))
    for box in boxes:
        painted = plain.copy()
        painted.paste((250, 0, 0), box)
        before, after = (vlm.image(each).tensors["pixel_values"] for each in (plain, painted))
        changed = (before != after).any(1).reshape(15, 4).any(1)
        x0, y0, x1, y1 = box
        assert vlm.patch_mask((x0, y0, x1, y1), size).tolist() == changed.tolist()


def test_a_box_scales_with_the_resize(vlm: VLM) -> None:
    for width, height in ((160, 84), (1000, 700), (57, 41)):
        rows, columns = vlm.grid((width, height))
        for box in ((0, 0, width, height), (5, 7, 40, 19), (50, 30, 51, 31), (9, 9, 9, 20)):
            x0, y0, x1, y1 = box
            wanted = [
                max(x0, Fraction(c * width, columns)) < min(x1, Fraction((c + 1) * width, columns))
                and max(y0, Fraction(r * height, rows)) < min(y1, Fraction((r + 1) * height, rows))
                for r in range(rows)
                for c in range(columns)
            ]
            found = vlm.patch_mask((x0, y0, x1, y1), (width, height))
            assert found.tolist() == wanted
