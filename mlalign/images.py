"""Decode an image safely: every failure names the record and the file. PIL only.

Serves every room that needs pixels. A bomb limit and a full decode up front mean that a bad file
is found where it is read, not at the training step that draws it.
"""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageFile, UnidentifiedImageError

from mlalign.records import ImageRef, RecordError

MAX_PIXELS = 89_478_485
"""Pillow's own warning limit, taken here as an error: about 9,460 x 9,460."""


def open_image(ref: ImageRef, record_id: str) -> Image.Image:
    """The decoded RGB image. Raises RecordError naming the record, the file and the mend."""
    where = ref.path or "image bytes"
    try:
        data = ref.read()
    except OSError as error:
        raise RecordError(
            record_id, "image", f"cannot read {where} ({error.strerror})", "Check the path"
        ) from error
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return opened.convert("RGB")
    except UnidentifiedImageError as error:
        raise RecordError(
            record_id, "image", f"{where} is not an image", "Give a PNG, JPEG or WebP file"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RecordError(
            record_id,
            "image",
            f"{where} has more than {MAX_PIXELS:,} pixels, as a decompression bomb would",
            "Resize the image",
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise RecordError(
            record_id, "image", f"{where} is truncated or damaged ({error})", "Fetch the file again"
        ) from error


def image_size(ref: ImageRef, record_id: str) -> tuple[int, int]:
    """(width, height) from the file's header. Raises RecordError as ``open_image`` does."""
    try:
        with Image.open(io.BytesIO(ref.read())) as opened:
            return opened.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return open_image(ref, record_id).size


def to_png(image: Image.Image) -> bytes:
    """PNG bytes, the same for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()
