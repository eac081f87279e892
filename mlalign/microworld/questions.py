"""Truthful questions about a scene, with their answers. They teach the base to look. No torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from mlalign.microworld.language import (
    NO,
    NOTHING,
    YES,
    Mention,
    claim_question,
    presence_question,
)
from mlalign.microworld.scenes import COLORS, OBJECTS, POSITIONS, SCENES, Scene, missing_companion

_T = TypeVar("_T")

_PRESENCE = (
    presence_question,
    lambda name: f"Does the image show a {name}?",
    lambda name: f"Can you see a {name} in this photo?",
)


def questions(scene: Scene, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """``count`` truthful (question, answer) pairs. Half of the yes/no questions are to be denied,
    and half of those ask for a typical companion that is absent, where there is one."""
    makers, weights = zip(*MAKERS.values(), strict=True)
    asked: dict[str, str] = {}
    while len(asked) < count:
        question, answer = rng.choices(makers, weights)[0](scene, rng)
        asked.setdefault(question, answer)
    return list(asked.items())


def _absent(scene: Scene, rng: random.Random) -> str:
    """An absent object: every other time the expected one, where there is one."""
    missing = missing_companion(scene)
    if missing is not None and rng.random() < 0.5:
        return missing[1]
    return rng.choice([n for n in OBJECTS if n not in scene.names()])


def _ask_presence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    word = rng.choices(_PRESENCE, (3, 1, 1))[0]
    if rng.random() < 0.5:
        return word(rng.choice(scene.objects).name), YES
    return word(_absent(scene, rng)), NO


def _ask_color_presence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    placed = rng.choice(scene.objects)
    color, name, answer = placed.color, placed.name, YES
    if rng.random() < 0.5:
        answer = NO
        if rng.random() < 0.5:
            name = _absent(scene, rng)
        else:
            color = rng.choice([c for c in COLORS if c != color])
    return f"Is there a {color} {name} in the image?", answer


def _ask_claim(scene: Scene, rng: random.Random) -> tuple[str, str]:
    mention, true = _claim(scene, rng)
    return claim_question(mention), YES if true else NO


def _claim(scene: Scene, rng: random.Random) -> tuple[Mention, bool]:
    """A mention and whether it is true. Half are false; most of those are wrong in one thing only:
    another object's place or colour, so that place, colour and object must be seen together."""
    placed = rng.choice(scene.objects)
    position, color, name = placed.position, placed.color, placed.name
    if rng.random() < 0.5:
        return Mention(position, color, name), True
    missing = missing_companion(scene)
    if missing is not None and rng.random() < 0.35:
        trigger, companion, slot = missing
        return Mention(POSITIONS[slot], trigger.color, companion), False
    wrong = rng.choices(("color", "swapped", "absent", "elsewhere"), (3, 3, 2, 1))[0]
    if wrong == "color":
        color = rng.choice([c for c in COLORS if c != color])
    elif wrong == "swapped":
        position = rng.choice([o.position for o in scene.objects if o is not placed])
    elif wrong == "absent":
        name = _absent(scene, rng)
    else:
        position = rng.choice([p for p in POSITIONS if p != position])
        name = rng.choice((name, _absent(scene, rng)))
    return Mention(position, color, name), False


def _ask_what(scene: Scene, rng: random.Random) -> tuple[str, str]:
    cell = rng.choice(scene.objects).cell if rng.random() < 0.75 else rng.randrange(len(POSITIONS))
    placed = scene.at(cell)
    answer = NOTHING if placed is None else f"A {placed.color} {placed.name}."
    return f"What is at the {POSITIONS[cell]}?", answer


def _ask_color(scene: Scene, rng: random.Random) -> tuple[str, str]:
    placed = rng.choice(scene.objects)
    word = rng.choice(("What color is the {}?", "Which color does the {} have?"))
    return word.format(placed.name), f"{placed.color.capitalize()}."


def _ask_where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    placed = rng.choice(scene.objects)
    return f"Where is the {placed.name}?", f"At the {placed.position}."


def _ask_relation(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Rows and columns decide: left of means in a column further left, whatever the rows."""
    if len(scene.objects) < 2:
        return _ask_what(scene, rng)
    one, two = rng.sample(scene.objects, 2)
    row, col = (one.cell // 3 - two.cell // 3, one.cell % 3 - two.cell % 3)
    relation, true = rng.choice(
        (("left of", col < 0), ("right of", col > 0), ("above", row < 0), ("below", row > 0))
    )
    return f"Is the {one.name} {relation} the {two.name}?", YES if true else NO


def _ask_kind(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        return "What kind of scene is this?", f"A {scene.kind}."
    kind = scene.kind if rng.random() < 0.5 else rng.choice([k for k in SCENES if k != scene.kind])
    return f"Is this a {kind}?", YES if kind == scene.kind else NO


def _drill_color(scene: Scene, rng: random.Random) -> tuple[str, str]:
    told = [f"{o.name} {o.color}" for o in _shuffled(scene.objects, rng)]
    return "List all objects and the color.", f"List: {', '.join(told)}."


def _drill_where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    told = [f"{o.name} {o.position}" for o in _shuffled(scene.objects, rng)]
    return "List all objects and where.", f"List: {', '.join(told)}."


def _drill_presence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    names = [rng.choice(scene.objects).name for _ in range(3)]
    names = list(dict.fromkeys([*names, *(_absent(scene, rng) for _ in range(3))]))
    names = _shuffled(names, rng)
    told = [f"{name} {'yes' if name in scene.names() else 'no'}" for name in names]
    return f"Look carefully: {', '.join(names)}?", f"Look: {', '.join(told)}."


def _drill_claim(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Whole claims and parts of them: place and object, place and colour, colour and object."""
    keep = rng.choice(("pcn", "pcn", "pn", "pc", "cn"))
    asked: dict[str, str] = {}
    for _ in range(4):
        m, _ = _claim(scene, rng)
        parts = [("p", m.position), ("c", m.color), ("n", m.name)]
        words = " ".join(text for key, text in parts if key in keep)
        true = any(
            ("p" not in keep or o.position == m.position)
            and ("c" not in keep or o.color == m.color)
            and ("n" not in keep or o.name == m.name)
            for o in scene.objects
        )
        asked[words] = "yes" if true else "no"
    told = [f"{words} {answer}" for words, answer in asked.items()]
    return f"Look carefully: {', '.join(asked)}?", f"Look: {', '.join(told)}."


def _shuffled(items: Sequence[_T], rng: random.Random) -> list[_T]:
    return rng.sample(list(items), len(items))


Maker = Callable[[Scene, random.Random], tuple[str, str]]

MAKERS: dict[str, tuple[Maker, float]] = {
    "claim": (_ask_claim, 5.0),
    "what": (_ask_what, 1.5),
    "presence": (_ask_presence, 3.0),
    "color_presence": (_ask_color_presence, 1.5),
    "color": (_ask_color, 2.5),
    "where": (_ask_where, 2.5),
    "relation": (_ask_relation, 0.5),
    "kind": (_ask_kind, 0.3),
    # Terse lists, in which the word before each answer is the very one to look for: what is learned
    # here in one step of attention, the questions above then need only carry to their answer.
    "drill_color": (_drill_color, 1.0),
    "drill_where": (_drill_where, 1.0),
    "drill_presence": (_drill_presence, 1.5),
    "drill_claim": (_drill_claim, 3.5),
}
"""Kind of question -> what makes one, and how often."""
