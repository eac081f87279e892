"""Images as a model's inputs, decoded once and kept while there is room."""

from __future__ import annotations

from mlalign.images import open_image
from mlalign.models._family import ImageInputs
from mlalign.models._vlm import VLM
from mlalign.records import ImageRef

CACHED_PIXELS = 256 * 2**20
"""Bytes of decoded images kept in memory per process."""


class Pictures:
    """Image references to a model's inputs. The same image gives the same object while it is kept,
    so that a batch encodes it once."""

    def __init__(self, vlm: VLM, *, blank: bool = False) -> None:
        """``blank``: every image is replaced by a uniform one of its shape."""
        self.vlm = vlm
        self.blank = blank
        self._kept: dict[str, ImageInputs] = {}
        self._bytes = 0

    def __call__(self, image: ImageRef, name: str, sha256: str = "") -> ImageInputs:
        """The inputs of ``image``; ``name`` is the record's id for errors. Raises RecordError."""
        key = sha256 or image.sha256()
        if key in self._kept:
            return self._kept[key]
        inputs = self.vlm.image(open_image(image, name))
        if self.blank:
            inputs = self.vlm.blank(inputs)
        size = sum(tensor.nbytes for tensor in inputs.tensors.values())
        if self._bytes + size <= CACHED_PIXELS:
            self._kept[key] = inputs
            self._bytes += size
        return inputs
