"""Images changed for a view: cropped, noised, blanked, or the record's own second image.

Every change of a record is drawn once, from the run's seed and the record's id, and stays the same
over epochs, ranks and resumes: the published code draws a new one each time, but then neither a
resumed run nor a cached reference is the run it was.

    crop    a region of ``area_min`` to ``area_max`` of the image (mDPO, 2406.11839: 1 to 20 %),
            aspect ratio 3/4 to 4/3, scaled back to the image's size
    noise   the forward diffusion of VCD and POVID (2311.16922, 2402.11411) at ``step`` of 1000:
                x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,   a_t = prod_{s <= t} (1 - b_s),
                b_s = sigmoid(6 (2 s / 999 - 1)) (0.5e-2 - 1e-5) + 1e-5,   x_0 in [0, 1]
            clamped to [0, 1]; ``wrap`` 1 lets values beyond run over in 8 bits, as POVID's released
            code does (about a third of the values of a mid-grey image at step 500)
    blank   a uniform image, as the probes have it
    record  ``rejected_image``
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np
from PIL import Image

from mlalign.branching.batch import ImageView
from mlalign.images import open_image
from mlalign.records import Preference, RecordError

STEPS = 1000
"""Steps of the diffusion."""
_FIRST, _LAST = 1e-5, 0.5e-2
"""Bounds of its betas."""


def view_key(view: ImageView, seed: int) -> str:
    """Text that changes with what a view shows: stands as the side of its completions."""
    settings = ",".join(f"{key}={value:g}" for key, value in view.settings)
    drawn = f"/{seed}" if view.image in ("crop", "noise") else ""
    return f"{view.name}:{view.image}({settings}){drawn}"


def view_image(view: ImageView, pair: Preference, image: Image.Image, seed: int) -> Image.Image:
    """What the view shows in the place of ``image`` (RGB). A blank is made of ``ImageInputs``, not
    here. Raises RecordError for a record without the image that "record" asks for."""
    settings = dict(view.settings)
    if view.image == "crop":
        return _crop(image, settings["area_min"], settings["area_max"], seed, pair.id)
    if view.image == "noise":
        return _noised(image, int(settings["step"]), bool(settings["wrap"]), seed, pair.id)
    assert view.image == "record"
    if pair.rejected_image is None:
        raise RecordError(
            pair.id,
            "rejected_image",
            "missing, but the objective compares with it",
            "Give one, or let the objective crop: train.objective.image: crop",
        )
    return open_image(pair.rejected_image, pair.id)


@cache
def signal(step: int) -> float:
    """a_t after ``step`` (index from 0): what is left of the image's variance.

    0.74480 at 500, 0.21810 at 800, 0.08125 at 999. Raises ValueError outside of 0..999.
    """
    if not 0 <= step < STEPS:
        raise ValueError(f"diffusion step {step}: 0 to {STEPS - 1}")
    ramp = np.linspace(-6.0, 6.0, STEPS)
    betas = (_LAST - _FIRST) / (1 + np.exp(-ramp)) + _FIRST
    return float(np.prod(1 - betas[: step + 1]))


def _noised(image: Image.Image, step: int, wrap: bool, seed: int, name: str) -> Image.Image:
    draw = np.random.default_rng([seed, *name.encode()])
    kept = signal(step)
    clean = np.asarray(image, dtype=np.float64) / 255
    noisy = np.sqrt(kept) * clean + np.sqrt(1 - kept) * draw.standard_normal(clean.shape)
    if wrap:
        return Image.fromarray((np.trunc(noisy * 255).astype(np.int64) % 256).astype(np.uint8))
    return Image.fromarray(np.round(noisy.clip(0, 1) * 255).astype(np.uint8))


def _crop(image: Image.Image, low: float, high: float, seed: int, name: str) -> Image.Image:
    draw = random.Random(f"{seed}/{name}/crop")
    width, height = image.size
    area = draw.uniform(low, high) * width * height
    # Uniform in the logarithm: as likely twice as wide as twice as high.
    ratio = (3 / 4) * (16 / 9) ** draw.random()
    w = min(width, max(1, round((area * ratio) ** 0.5)))
    h = min(height, max(1, round(area / w)))
    left, top = draw.randint(0, width - w), draw.randint(0, height - h)
    region = image.crop((left, top, left + w, top + h))
    return region.resize(image.size, Image.Resampling.BICUBIC)
