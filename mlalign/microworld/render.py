"""A scene as pixels: the background of its kind, then one icon per object. PIL only."""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageDraw

from mlalign.microworld import icons
from mlalign.microworld.scenes import IMAGE_SIZE, SCENES, Scene

_PERIOD = 16
"""Pixels after which every texture repeats."""


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of IMAGE_SIZE x IMAGE_SIZE pixels."""
    image = _background(scene.kind, scene.phase % _PERIOD).copy()
    for placed in scene.objects:
        picture = icons.icon(placed.name, placed.color, placed.size)
        image.paste(picture, placed.box[:2], picture)
    return image


@cache
def _background(kind: str, phase: int) -> Image.Image:
    """Plain colour with a faint texture, different for each kind."""
    base = SCENES[kind].background
    line: tuple[int, ...] = tuple(max(0, v - 18) for v in base)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), base)
    draw = ImageDraw.Draw(image)
    for offset in range(phase - _PERIOD, IMAGE_SIZE + _PERIOD, _PERIOD):
        if kind in ("kitchen", "street"):  # tiles; bricks
            draw.line((0, offset, IMAGE_SIZE, offset), fill=line)
        if kind in ("kitchen", "office"):  # tiles; panels
            draw.line((offset, 0, offset, IMAGE_SIZE), fill=line)
        if kind == "park":  # tufts
            for x in range(0, IMAGE_SIZE, 8):
                draw.line((x, offset + x % 3 * 5, x + 2, offset + x % 3 * 5 - 3), fill=line)
        if kind == "harbour":  # waves
            for x in range(-8, IMAGE_SIZE, 12):
                draw.arc((x, offset, x + 12, offset + 6), 0, 180, fill=line)
    return image
