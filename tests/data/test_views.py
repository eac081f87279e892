"""Changed images: the diffusion's constants, what clamping does, crops, and that draws stay put."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from mlalign.branching.batch import ImageView
from mlalign.branching.views import signal
from mlalign.data.views import view_image, view_key
from mlalign.images import open_image, to_png
from mlalign.records import ImageRef, RecordError
from tests.train.pairs import make_pairs

PAIR = make_pairs(1)[0]
GREY = Image.new("RGB", (64, 48), (128, 128, 128))


def noise(step: int = 500, wrap: bool = False) -> ImageView:
    return ImageView("noisy", "noise", settings=(("step", step), ("wrap", float(wrap))))


def crop(low: float = 0.01, high: float = 0.2) -> ImageView:
    return ImageView("other", "crop", settings=(("area_min", low), ("area_max", high)))


def test_the_schedule() -> None:
    found = [signal(step) for step in range(1000)]
    assert all(a > b for a, b in itertools.pairwise(found))
    for step, expected in ((500, 0.7448), (600, 0.5391), (800, 0.2181), (999, 0.0813)):
        assert found[step] == pytest.approx(expected, abs=6e-5)
    with pytest.raises(ValueError, match="0 to 999"):
        signal(1000)


def test_noise_has_the_mean_and_spread_of_the_formula() -> None:
    """At a step where nothing of mid-grey is clamped."""
    step = 100
    values = np.asarray(view_image(noise(step), PAIR, GREY, 0), dtype=float) / 255
    kept = signal(step)
    assert values.mean() == pytest.approx(kept**0.5 * 128 / 255, abs=2e-3)
    assert values.std() == pytest.approx((1 - kept) ** 0.5, rel=0.03)


def test_clamped_or_run_over() -> None:
    clamped = np.asarray(view_image(noise(), PAIR, GREY, 0)).astype(int)
    wrapped = np.asarray(view_image(noise(wrap=True), PAIR, GREY, 0)).astype(int)
    beyond = (clamped == 0) | (clamped == 255)
    # About a third of the values of a mid-grey image at step 500 leave [0, 1].
    assert 0.25 < beyond.mean() < 0.42
    assert np.abs(clamped - wrapped)[~beyond].max() <= 1, "the same draw, truncated not rounded"
    assert np.abs(clamped - wrapped)[beyond].mean() > 100


def test_crops_keep_the_stated_share() -> None:
    """Measured on a ramp: the range of columns and rows that a crop shows is its extent."""
    width, height = 200, 100
    columns = np.tile(np.arange(width), (height, 1))
    rows = np.tile(np.arange(height)[:, None], (1, width))
    ramp = Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))
    shares = []
    for number in range(200):
        pair = dataclasses.replace(PAIR, id=f"p{number}")
        shown = np.asarray(view_image(crop(0.05, 0.2), pair, ramp, 0)).astype(float)
        assert shown.shape == (height, width, 3)
        w, h = (np.ptp(shown[..., c]) + 1 for c in (0, 1))
        shares.append(w * h / (width * height))
    assert min(shares) > 0.03 and max(shares) < 0.24
    assert 0.1 < np.mean(shares) < 0.15 and np.std(shares) > 0.03


@pytest.mark.parametrize("view", [noise(), crop()])
def test_a_record_is_drawn_once(view: ImageView) -> None:
    image = open_image(PAIR.image, PAIR.id)
    shown = view_image(view, PAIR, image, 0).tobytes()
    assert shown == view_image(view, PAIR, image, 0).tobytes()
    assert shown != view_image(view, PAIR, image, 1).tobytes()
    assert shown != view_image(view, dataclasses.replace(PAIR, id="another"), image, 0).tobytes()
    assert shown != image.tobytes()


def test_a_key_changes_with_what_is_shown() -> None:
    views = [noise(), noise(800), noise(wrap=True), crop(), crop(high=0.3)]
    keys = {view_key(view, 0) for view in views} | {view_key(crop(), 1)}
    assert len(keys) == 6
    record = ImageView("other", "record")
    assert view_key(record, 0) == view_key(record, 1), "nothing is drawn"


def test_the_records_own_second_image() -> None:
    record = ImageView("other", "record")
    with pytest.raises(RecordError, match="rejected_image: missing"):
        view_image(record, PAIR, GREY, 0)
    other = dataclasses.replace(PAIR, rejected_image=ImageRef(path="x", data=to_png(GREY)))
    assert view_image(record, other, open_image(PAIR.image, "x"), 0).tobytes() == GREY.tobytes()
