"""Twenty objects drawn with PIL, each with a silhouette of its own. No torch.

Shapes are given in a square of 100 units and drawn four times enlarged, then reduced. The edge of
an icon is cut hard, so that its box is exact: every pixel inside the silhouette is painted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

COLOR_RGB: dict[str, RGB] = {
    "red": (220, 30, 30),
    "green": (20, 150, 40),
    "blue": (30, 60, 225),
    "yellow": (250, 220, 20),
    "purple": (150, 30, 180),
    "white": (250, 250, 250),
}
_OUTLINE: RGB = (24, 24, 28)
_OVERSAMPLE = 4


class _Pen:
    """Draws in units of a 100 x 100 square: fills with outline (``f``), dark details (``d``)."""

    def __init__(self, draw: ImageDraw.ImageDraw, scale: float, color: RGB) -> None:
        self.draw, self.scale, self.color = draw, scale, color
        self.width = max(1, round(5 * scale))

    def _xy(self, points: tuple[float, ...]) -> list[float]:
        return [p * self.scale for p in points]

    def poly(self, *points: float, dark: bool = False) -> None:
        xy = self._xy(points)
        self.draw.polygon(xy, fill=_OUTLINE if dark else self.color)
        self.draw.line(xy + xy[:2], fill=_OUTLINE, width=self.width, joint="curve")

    def oval(self, *box: float, dark: bool = False) -> None:
        fill = _OUTLINE if dark else self.color
        self.draw.ellipse(self._xy(box), fill=fill, outline=_OUTLINE, width=self.width)

    def ring(self, *box: float, width: float = 9) -> None:
        """A circle open in the middle."""
        self.draw.ellipse(self._xy(box), outline=self.color, width=round(width * self.scale))

    def box(self, *box: float, dark: bool = False) -> None:
        fill = _OUTLINE if dark else self.color
        self.draw.rectangle(self._xy(box), fill=fill, outline=_OUTLINE, width=self.width)

    def line(self, *points: float, width: float = 6, dark: bool = True) -> None:
        fill = _OUTLINE if dark else self.color
        self.draw.line(self._xy(points), fill=fill, width=round(width * self.scale), joint="curve")

    def arc(self, *box: float, start: float, end: float, width: float = 8) -> None:
        self.draw.arc(self._xy(box), start, end, fill=_OUTLINE, width=round(width * self.scale))


def _pot(p: _Pen) -> None:
    p.box(2, 42, 98, 54, dark=True)
    p.box(14, 34, 86, 88)
    p.box(10, 26, 90, 36, dark=True)
    p.box(42, 14, 58, 28, dark=True)


def _kettle(p: _Pen) -> None:
    p.arc(22, 4, 78, 70, start=180, end=360, width=9)
    p.poly(60, 62, 98, 34, 98, 46, 70, 84)
    p.oval(10, 38, 78, 94)


def _bowl(p: _Pen) -> None:
    p.poly(3, 36, 97, 36, 86, 66, 66, 80, 34, 80, 14, 66)
    p.box(34, 80, 66, 88, dark=True)


def _spoon(p: _Pen) -> None:
    p.line(40, 60, 96, 4, width=14)
    p.line(42, 58, 94, 6, width=7, dark=False)
    p.oval(4, 50, 50, 96)


def _laptop(p: _Pen) -> None:
    p.box(16, 16, 84, 66, dark=True)
    p.box(23, 23, 77, 59)
    p.poly(14, 68, 86, 68, 99, 86, 1, 86)


def _pencil(p: _Pen) -> None:
    p.poly(68, 4, 96, 32, 36, 92, 8, 64)
    p.poly(8, 64, 36, 92, 3, 97, dark=True)


def _book(p: _Pen) -> None:
    p.poly(50, 26, 50, 86, 4, 76, 4, 16)
    p.poly(50, 26, 50, 86, 96, 76, 96, 16)


def _lamp(p: _Pen) -> None:
    p.line(50, 40, 50, 92, width=9)
    p.box(28, 86, 72, 96, dark=True)
    p.poly(34, 4, 66, 4, 92, 48, 8, 48)


def _tree(p: _Pen) -> None:
    p.box(42, 58, 58, 97, dark=True)
    p.oval(14, 30, 56, 70)
    p.oval(44, 30, 86, 70)
    p.oval(27, 3, 73, 50)
    p.draw.ellipse(p._xy((30, 34, 70, 62)), fill=p.color)


def _bench(p: _Pen) -> None:
    p.box(12, 60, 22, 92, dark=True)
    p.box(78, 60, 88, 92, dark=True)
    p.box(12, 22, 22, 60, dark=True)
    p.box(78, 22, 88, 60, dark=True)
    p.box(2, 24, 98, 40)
    p.box(2, 54, 98, 68)


def _dog(p: _Pen) -> None:
    p.line(80, 52, 97, 26, width=9)
    for x in (30, 44, 68, 80):
        p.box(x - 5, 66, x + 5, 94, dark=True)
    p.oval(20, 40, 90, 76)
    p.oval(3, 14, 46, 54)
    p.poly(30, 12, 46, 10, 44, 40, dark=True)


def _ball(p: _Pen) -> None:
    p.oval(8, 8, 92, 92)
    p.line(8, 50, 92, 50, width=9)
    p.line(50, 8, 50, 92, width=9)


def _car(p: _Pen) -> None:
    p.poly(26, 48, 38, 24, 68, 24, 80, 48)
    p.box(3, 46, 97, 72)
    p.oval(14, 60, 38, 86, dark=True)
    p.oval(62, 60, 86, 86, dark=True)


def _sign(p: _Pen) -> None:
    p.line(50, 50, 50, 98, width=9)
    p.poly(50, 2, 84, 34, 50, 66, 16, 34)


def _house(p: _Pen) -> None:
    p.box(16, 46, 84, 95)
    p.poly(50, 4, 98, 48, 2, 48, dark=True)
    p.box(42, 64, 58, 95, dark=True)


def _bicycle(p: _Pen) -> None:
    p.ring(2, 44, 46, 88, width=12)
    p.ring(54, 44, 98, 88, width=12)
    p.line(24, 66, 40, 34, 68, 34, 76, 66, width=8)
    p.line(40, 34, 54, 66, 68, 34, width=8)
    p.line(62, 18, 78, 18, width=9)
    p.line(70, 18, 68, 34, width=8)


def _boat(p: _Pen) -> None:
    p.line(50, 4, 50, 66, width=7)
    p.poly(54, 8, 90, 56, 54, 56)
    p.poly(3, 64, 97, 64, 78, 92, 22, 92)


def _flag(p: _Pen) -> None:
    p.line(14, 2, 14, 98, width=11)
    p.poly(20, 8, 94, 8, 76, 30, 94, 54, 20, 54)


def _fish(p: _Pen) -> None:
    p.poly(62, 50, 97, 22, 97, 78)
    p.oval(3, 26, 76, 74)
    p.oval(14, 40, 26, 52, dark=True)


def _bucket(p: _Pen) -> None:
    p.arc(14, 3, 86, 75, start=180, end=360, width=8)
    p.poly(10, 40, 90, 40, 74, 95, 26, 95)
    p.line(16, 56, 84, 56, width=7)


_SHAPES: dict[str, Callable[[_Pen], None]] = {
    "pot": _pot,
    "kettle": _kettle,
    "bowl": _bowl,
    "spoon": _spoon,
    "laptop": _laptop,
    "pencil": _pencil,
    "book": _book,
    "lamp": _lamp,
    "tree": _tree,
    "bench": _bench,
    "dog": _dog,
    "ball": _ball,
    "car": _car,
    "sign": _sign,
    "house": _house,
    "bicycle": _bicycle,
    "boat": _boat,
    "flag": _flag,
    "fish": _fish,
    "bucket": _bucket,
}
NAMES = tuple(_SHAPES)


@cache
def icon(name: str, color: str, size: int) -> Image.Image:
    """The object as RGBA, cut to its silhouette's box; alpha is 0 or 255. Do not alter it.

    ``size`` is the side in pixels of the square that it is drawn in.
    """
    side = size * _OVERSAMPLE
    canvas = Image.new("RGBA", (side, side), (*_OUTLINE, 0))
    pen = _Pen(ImageDraw.Draw(canvas), side / 100, COLOR_RGB[color])
    _SHAPES[name](pen)
    color_small = canvas.convert("RGB").resize((size, size), Image.Resampling.BOX)
    alpha = canvas.getchannel("A").resize((size, size), Image.Resampling.BOX)
    alpha = alpha.point([255 if value >= 128 else 0 for value in range(256)])
    color_small.putalpha(alpha)
    return color_small.crop(alpha.getbbox())
