"""Small preference pairs on rendered scenes, of unequal lengths and prompts."""

from __future__ import annotations

import hashlib

from mlalign.images import to_png
from mlalign.microworld import world
from mlalign.microworld.language import CAPTION_PROMPTS
from mlalign.records import ImageRef, Preference
from tests.models import exact

SIZES = ((96, 96), (160, 60), (60, 90))
"""(width, height) that the small models of every family take."""


def make_pairs(count: int) -> list[Preference]:
    """Captions of the image against captions of another; prompts and lengths vary."""
    pairs = []
    for index in range(count):
        example = world.example("pairs", index)
        other = world.example("pairs", 1000 + index)
        pairs.append(
            Preference(
                id=f"pair-{index}",
                image=example.image,
                image_sha256=example.image_sha256,
                prompt=CAPTION_PROMPTS[index % len(CAPTION_PROMPTS)],
                chosen=example.facts.captions[0],
                rejected=other.facts.captions[0] if index % 2 else "A red kettle.",
                facts=example.facts,
            )
        )
    return pairs


def shaped_pairs(count: int) -> list[Preference]:
    """Pairs in the words of ``exact``, which every small model's tokenizer knows, on pictures of
    different shapes."""
    answers = [text for group in exact.ANSWERS for text in group]
    pairs = []
    for index in range(count):
        data = to_png(exact.picture(*SIZES[index % len(SIZES)], seed=index))
        pairs.append(
            Preference(
                id=f"pair-{index}",
                image=ImageRef(data=data),
                image_sha256=hashlib.sha256(data).hexdigest(),
                prompt=exact.PROMPTS[index % len(exact.PROMPTS)],
                chosen=answers[index % len(answers)],
                rejected=answers[(index + 3) % len(answers)],
            )
        )
    return pairs
