"""A file that cannot be used is named, with record and mend; nothing half-decoded passes."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from mlalign import images
from mlalign.records import ImageRef, RecordError


def encoded(format: str = "PNG", size: tuple[int, int] = (32, 24), mode: str = "RGB") -> bytes:
    """A picture with something in every row, so that a cut loses something."""
    picture = Image.effect_noise(size, 80).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, format=format)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is width x height."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\x00"))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def refusal(ref: ImageRef) -> str:
    with pytest.raises(RecordError) as caught:
        images.open_image(ref, "rec-7")
    assert caught.value.record_id == "rec-7"
    assert caught.value.key == "image"
    return str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = images.open_image(ImageRef(data=encoded(mode=mode)), "r")
    assert (image.mode, image.size) == ("RGB", (32, 24))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_usual_formats(format: str, tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(encoded(format))
    assert images.open_image(ImageRef(path=str(file)), "r").size == (32, 24)


def test_missing(tmp_path: Path) -> None:
    said = refusal(ImageRef(path=str(tmp_path / "gone.jpg")))
    assert "record 'rec-7'" in said and "gone.jpg" in said and "Check the path" in said


def test_a_folder(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(ImageRef(path=str(tmp_path)))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated(tmp_path: Path, format: str, part: float) -> None:
    whole = encoded(format, size=(200, 150))
    file = tmp_path / "cut.img"
    file.write_bytes(whole[: int(len(whole) * part)])
    said = refusal(ImageRef(path=str(file)))
    assert "cut.img is truncated or damaged" in said and "Fetch the file again" in said


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\x00" * 64, b"\x89PNG\r\n\x1a\n"])
def test_not_an_image(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "page.jpg"
    file.write_bytes(data)
    said = refusal(ImageRef(path=str(file)))
    assert "page.jpg" in said
    assert "is not an image. Give a PNG" in said or "truncated or damaged" in said


# Over Pillow's warning limit, and over its error limit (twice as much).
@pytest.mark.parametrize("side", [12_000, 30_000])
def test_decompression_bomb(tmp_path: Path, side: int) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(bomb(side, side))
    said = refusal(ImageRef(path=str(file)))
    assert "bomb.png" in said and "decompression bomb" in said and "Resize the image" in said


def test_bytes_without_a_name_are_called_so() -> None:
    assert "image bytes is not an image" in refusal(ImageRef(data=b"no"))


def test_png_bytes_are_the_same_for_the_same_pixels() -> None:
    first = images.open_image(ImageRef(data=encoded()), "r")
    again = images.open_image(ImageRef(data=images.to_png(first)), "r")
    assert images.to_png(first) == images.to_png(again)
    assert first.tobytes() == again.tobytes()
