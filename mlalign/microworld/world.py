"""The microworld as records: one example or one training dialogue per scene. No torch."""

from __future__ import annotations

import hashlib
import random

from mlalign.images import to_png
from mlalign.microworld import language
from mlalign.microworld.questions import questions
from mlalign.microworld.render import render
from mlalign.microworld.scenes import Scene, make_scene
from mlalign.records import Dialogue, Example, Facts, ImageRef, ObjectFact

SOURCE = "microworld"
CAPTION_RATE = 0.45
"""Share of dialogues with a caption request; the others are questions alone, so that the answers
cannot be read off a caption."""
QUESTIONS_WITH_CAPTION, QUESTIONS_ALONE = 3, 8
"""Questions per dialogue."""
STYLE_WEIGHTS = (0.91, 0.03, 0.03, 0.03)
"""How often an SFT caption has each style."""


def example(split: str, index: int, seed: int = 0) -> Example:
    """Scene ``index`` of a split with the caption request and everything that is known of it."""
    scene = make_scene(split, index, seed)
    ref, digest = _image(scene, split, index)
    return Example(
        id=f"{SOURCE}-{split}-{index}",
        image=ref,
        image_sha256=digest,
        prompt=language.CAPTION_PROMPTS[0],
        facts=facts(scene),
        source=SOURCE,
    )


def facts(scene: Scene) -> Facts:
    """All that is true of a scene."""
    return Facts(
        objects=tuple(
            ObjectFact(
                name=o.name,
                box=(float(o.box[0]), float(o.box[1]), float(o.box[2]), float(o.box[3])),
                attributes=(o.color,),
                position=o.position,
            )
            for o in scene.objects
        ),
        captions=(language.caption(scene.kind, language.true_mentions(scene)),),
        scene=scene.kind,
        exhaustive=True,
    )


def dialogue(split: str, index: int, seed: int = 0) -> Dialogue:
    """An SFT dialogue: truthful questions, and often a caption with the prior before or after."""
    scene = make_scene(split, index, seed)
    ref, digest = _image(scene, split, index)
    return Dialogue(
        id=f"{SOURCE}-{split}-{index}",
        image=ref,
        image_sha256=digest,
        turns=turns(scene, random.Random(f"microworld/dialogue/{seed}/{split}/{index}")),
        source=SOURCE,
    )


def turns(scene: Scene, rng: random.Random) -> tuple[tuple[str, str], ...]:
    """The turns of a dialogue. A caption comes first or last, each half of the time."""
    if rng.random() >= CAPTION_RATE:
        return tuple(questions(scene, rng, QUESTIONS_ALONE))
    prompt = rng.choices(language.CAPTION_PROMPTS, (3, 1, 1, 1, 1))[0]
    style = rng.choices(range(language.N_STYLES), STYLE_WEIGHTS)[0]
    told = language.caption(scene.kind, language.sft_mentions(scene, rng), style)
    asked = questions(scene, rng, QUESTIONS_WITH_CAPTION)
    described = [(prompt, told)]
    return tuple(described + asked if rng.random() < 0.5 else asked + described)


def _image(scene: Scene, split: str, index: int) -> tuple[ImageRef, str]:
    data = to_png(render(scene))
    ref = ImageRef(data=data, path=f"{SOURCE}/{split}/{index}.png")
    return ref, hashlib.sha256(data).hexdigest()
