"""Images for the page: scaled down, boxes drawn, attention laid over, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

from mlalign.records import ObjectFact

SIDE = 256
"""Longer side of a picture on the page, in pixels."""
SMALL = 144
"""Longer side of an attention overlay."""
BOX_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A5C00", "#000000")
HEAT = (213, 60, 0)
"""Colour of full attention; the picture beneath is greyed, so that no hue of it is mistaken."""


def boxed(image: Image.Image, objects: Iterable[ObjectFact], side: int = SIDE) -> Image.Image:
    """The picture with a labelled box for every object that has one."""
    picture, scale = scaled(image, side)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=11)
    for i, thing in enumerate(o for o in objects if o.box is not None):
        assert thing.box is not None
        colour = BOX_COLOURS[i % len(BOX_COLOURS)]
        x0, y0, x1, y1 = (value * scale for value in thing.box)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=2)
        left, top, right, bottom = draw.textbbox((0, 0), thing.name, font=font)
        width, height = right - left + 5, bottom - top + 4
        # The label keeps inside the picture: over the box where there is room, else in it.
        x = max(0.0, min(x0, picture.width - width))
        y = y0 - height if y0 >= height else y0
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        draw.text((x + 2 - left, y + 2 - top), thing.name, fill="white", font=font)
    return picture


def overlaid(
    image: Image.Image,
    values: Sequence[float],
    grid: tuple[int, int],
    *,
    mode: str,
    top: float,
    side: int = SMALL,
) -> Image.Image:
    """The picture in grey with attention over it; ``top`` is the value of full colour.

    ``mode`` pad: the grid lies over the square of the longer side; crop: over the centre square
    of the shorter one, which is what a resize to the shortest edge and a centre crop leave.
    """
    rows, columns = grid
    if len(values) != rows * columns:
        raise ValueError(f"attention map of {len(values)} values on a grid of {rows} x {columns}")
    picture, _ = scaled(image, side)
    grey = picture.convert("L").point(lambda v: 70 + v * 0.7).convert("RGB")
    strengths = bytes(
        round(255 * min(max(v / top, 0.0), 1.0) ** 0.7 * 0.85) if top > 0 else 0 for v in values
    )
    heat = Image.frombytes("L", (columns, rows), strengths)
    width, height = picture.size
    edge = max(width, height) if mode == "pad" else min(width, height)
    alpha = Image.new("L", picture.size, 0)
    alpha.paste(
        heat.resize((edge, edge), Image.Resampling.BICUBIC),
        ((width - edge) // 2, (height - edge) // 2),
    )
    grey.paste(Image.new("RGB", picture.size, HEAT), (0, 0), alpha)
    return grey


def seen(image: Image.Image, mode: str, grid: tuple[int, int], side: int) -> Image.Image:
    """What of the picture lies under the grid of image tokens, ``side`` pixels wide.

    A square grid: ``mode`` as in ``overlaid``, the padding grey. Any other lies over the whole.
    """
    if grid[0] != grid[1]:
        return image.convert("RGB").resize((side, round(side * grid[0] / grid[1])))
    picture, _ = scaled(image.convert("RGB"), side)
    edge = max(picture.size) if mode == "pad" else min(picture.size)
    view = Image.new("RGB", (edge, edge), "#808080")
    view.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return view.resize((side, side), Image.Resampling.NEAREST if side % edge == 0 else None)


def scaled(image: Image.Image, side: int) -> tuple[Image.Image, float]:
    """The picture with its longer side at ``side``, and the factor."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    # Small rendered scenes are enlarged without blur.
    how = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    return image.resize(size, how), factor


def data_uri(image: Image.Image) -> str:
    """PNG for few colours, else JPEG, whichever is smaller, as a data URI."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=82)
    kind, data = ("png", png) if png.tell() <= jpeg.tell() * 1.5 else ("jpeg", jpeg)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
