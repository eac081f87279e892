"""What reference log-probs depend on: the key of a cache, and digests of what each entry saw."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

LAYOUT_VERSION = "1"
"""Raise it when layout, attention or the log-prob code may give other numbers than before."""


class CacheError(ValueError):
    """A reference cache that cannot be used. The message names what is wrong and the mend."""


class StaleEntry(CacheError):
    """Log-probs of a record that has changed since they were computed."""


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What reference log-probs depend on beside the record; each field is a text, not empty.

    Not in it: attention path, gradient checkpointing, batch size and batch-mates, which move
    log-probs within the dtype's noise floor only. Raises CacheError for a field that is no text.
    """

    data: str
    """Name of the pairs, e.g. the arm: ids may recur elsewhere. Their content is in each entry."""
    model: str
    """Path or Hub id."""
    revision: str
    """Revision on the Hub, or "none"."""
    weights: str
    """``fingerprint_files`` of the weights."""
    dtype: str
    """Dtype of weights and activations."""
    quantization: str
    """``fingerprint_json`` of the settings, or "none"."""
    adapter: str
    """``fingerprint_files`` of the adapter that the reference has on, or "none"."""
    processor: str
    """``fingerprint_json`` of the processor's settings and of what else decides pixel values."""
    chat_template: str
    """The template or its hash."""
    layout: str = LAYOUT_VERSION
    """Version of the code that computes log-probs."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, str) or not value:
                raise CacheError(f'cache key, {name}: {value!r} is no text; "none" where none is')

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all fields."""
        return fingerprint_json(asdict(self))

    def folder_in(self, root: str | Path) -> Path:
        """This key's folder under ``root``, shared by recipes that differ in beta or rate only."""
        return Path(root) / self.fingerprint()[:16]


InputDigest = tuple[bytes, bytes]
"""Of the prefix and of the image that a completion was conditioned on."""


def input_digest(prefix: Sequence[int] | Tensor, image: str) -> InputDigest:
    """Of the prefix's token ids and a text that changes with the image, such as the SHA-256 of its
    file or of its pixels. Raises ValueError for an empty text, which would never change."""
    if not image:
        raise ValueError('empty image digest: give the SHA-256 of its bytes, or "none"')
    return digest_ids(prefix), hashlib.sha256(image.encode()).digest()[:16]


def fingerprint_json(value: Any) -> str:
    """SHA-256 (hex) of JSON values in any order of keys. Refuses objects (TypeError) and NaN."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_files(paths: Iterable[str | Path]) -> str:
    """SHA-256 (hex) over names and contents of files, in whatever order and wherever they lie.
    Read once per process while size, times and inode stay. Raises ValueError for no files."""
    files = {Path(os.path.abspath(path)) for path in paths}
    if not files:
        raise ValueError("no files to fingerprint")
    root = os.path.commonpath([file.parent for file in files])
    return fingerprint_json({os.path.relpath(f, root): _sha256(f, _stamp(f)) for f in files})


def _stamp(file: Path) -> tuple[int, ...]:
    # The change time too: a copy that keeps the modification time would pass for the old file.
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@functools.cache
def _sha256(file: Path, _stamp: tuple[int, ...]) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_ids(ids: Any) -> bytes:
    """16 bytes of SHA-256 over token ids."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).digest()[:16]
