"""Small preference pairs on rendered scenes, of unequal lengths and prompts."""

from __future__ import annotations

from mlalign.microworld import world
from mlalign.microworld.language import CAPTION_PROMPTS
from mlalign.records import Preference


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
