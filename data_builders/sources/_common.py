"""What sources share: one order per seed, splits, images that are opened before they are used."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from mlalign.images import open_image
from mlalign.records import ImageRef, RecordError, Skip

SPLITS = ("train", "heldout", "probe")


def check_split(split: str, source: str) -> None:
    """ValueError for a split that a source does not have."""
    if split not in SPLITS:
        raise ValueError(f"source {source} has no split {split!r}. There are: {', '.join(SPLITS)}")


def cut_probe(train: list[str], probe: int, split: str, source: str) -> list[str]:
    """The part of the training list that is "train", or the end of it that is "probe"."""
    if probe >= len(train) > 0:
        raise ValueError(
            f"data.source.probe: {probe} images are kept for probes, but {source} has only "
            f"{len(train)} training images; lower it"
        )
    cut = len(train) - probe
    return train[:cut] if split == "train" else train[cut:]


def shuffled(items: Sequence[str], seed: int) -> list[str]:
    """The items in an order that depends on the seed alone, not on the order they came in."""
    out = sorted(items)
    random.Random(f"order/{seed}").shuffle(out)
    return out


def hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone: splits that never move."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def checked_image(path: str, record_id: str) -> tuple[ImageRef, str] | Skip:
    """The image and its hash after decoding it once; a Skip where it cannot be used."""
    ref = ImageRef(path=path)
    try:
        open_image(ref, record_id)
    except RecordError as error:
        return faulty(error)
    return ref, ref.sha256()


def faulty(error: RecordError) -> Skip:
    """A Skip whose reason is the same for the same kind of fault; the message stands in detail."""
    problem = error.reason.split(": ", 1)[-1]
    kinds = (
        ("cannot read", "image cannot be read"),
        ("is not an image", "image file is not an image"),
        ("more than", "image has too many pixels"),
        ("truncated", "image is truncated or damaged"),
    )
    known = next((reason for words, reason in kinds if words in problem), error.reason)
    reason = known if error.key == "image" else error.reason
    return Skip(id=error.record_id, reason=reason, detail=str(error))
