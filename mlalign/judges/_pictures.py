"""Images as a chat request takes them: base64 data URLs. PIL only."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from mlalign.images import image_size, open_image
from mlalign.records import ImageRef, RecordError

SENT_AS_THEY_ARE = frozenset({"PNG", "JPEG", "WEBP", "GIF"})
"""Formats that the OpenAI API takes; an image in another is sent as PNG."""


def image_key(ref: ImageRef, record_id: str, max_side: int) -> dict[str, Any]:
    """What stands for an image in a request's key: the hash of the encoded bytes, and the side to
    which it is shrunk where it is. Raises RecordError for one that cannot be read."""
    try:
        digest = ref.sha256()
    except OSError as error:
        raise RecordError(
            record_id,
            "image",
            f"cannot read {ref.path or 'image bytes'} ({error.strerror})",
            "Check the path",
        ) from error
    key: dict[str, Any] = {"sha256": digest}
    if max(image_size(ref, record_id)) > max_side:
        key["max_side"] = max_side
    return key


def data_url(ref: ImageRef, record_id: str, max_side: int) -> str:
    """The original bytes, or a PNG of the image shrunk so that no side is longer than ``max_side``.

    Decoded once in any case: a damaged image raises RecordError and is not paid for.
    """
    picture = open_image(ref, record_id)
    data = ref.read()
    with Image.open(io.BytesIO(data)) as opened:
        form = opened.format or ""
    if max(picture.size) > max_side or form not in SENT_AS_THEY_ARE:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        data, form = buffer.getvalue(), "PNG"
    return f"data:image/{form.lower()};base64,{base64.b64encode(data).decode()}"
