"""Images changed for a view: cropped, noised, blanked, or the record's own second image.

Every change of a record is drawn once, from the run's seed and the record's id, and stays the same
over epochs, ranks and resumes: the published code draws a new one each time, but then neither a
resumed run nor a cached reference is the run it was.

    crop    a region of ``area_min`` to ``area_max`` of the image (mDPO, 2406.11839: 1 to 20 %),
            aspect ratio 3/4 to 4/3, scaled back to the image's size
    noise   the forward diffusion of VCD and POVID at ``step`` of 1000 (``branching.views.noised``);
            ``wrap`` 1 as POVID's released code, else clamped
    blank   a uniform image, as the probes have it
    record  ``rejected_image``
"""

from __future__ import annotations

import random

from PIL import Image

from mlalign.branching.batch import ImageView
from mlalign.branching.views import noised
from mlalign.images import open_image
from mlalign.records import Preference, RecordError


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
        return noised(image, int(settings["step"]), bool(settings["wrap"]), seed, pair.id)
    assert view.image == "record"
    if pair.rejected_image is None:
        raise RecordError(
            pair.id,
            "rejected_image",
            "missing, but the objective compares with it",
            "Give one, or let the objective crop: train.objective.image: crop",
        )
    return open_image(pair.rejected_image, pair.id)


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
