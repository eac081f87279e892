"""What is in a scene: kinds of scene, objects, and the law by which a scene is drawn. No torch.

The law is made so that looking is the only way to tell a true caption from a false one. A scene
with a trigger (a pot) has a slot, the next cell in raster order, and one coin
decides whether its companion (a kettle of the same colour) really stands there. Where it does not,
the training captions mostly claim it all the same (``language.sft_mentions``). Everything else is
drawn alike on both sides of the coin, so the text of a caption says nothing about its truth.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mlalign.microworld import icons

IMAGE_SIZE = 96
"""Pixels on each side of an image."""
GRID = 3
"""Cells on each side; a cell holds at most one object."""
CELL = IMAGE_SIZE // GRID
"""Pixels on each side of a cell."""

COLORS = ("red", "green", "blue", "yellow", "purple", "white")
POSITIONS = tuple(
    f"{row} {col}" for row in ("top", "middle", "bottom") for col in ("left", "center", "right")
)
"""Names of the nine cells in raster order."""
SPLITS = ("train", "pairs", "heldout", "probe")


@dataclass(frozen=True)
class SceneKind:
    """A kind of scene and what is usual in it."""

    name: str
    pairs: tuple[tuple[str, str], ...]
    """(trigger, companion): a trigger stands in this kind of scene only and makes its companion
    expected; companions stand anywhere."""
    neutral: tuple[str, ...]
    """Typical objects that trigger nothing here."""
    background: tuple[int, int, int]


SCENES: dict[str, SceneKind] = {
    kind.name: kind
    for kind in (
        SceneKind("kitchen", (("pot", "kettle"), ("bowl", "spoon")), ("lamp",), (196, 160, 128)),
        SceneKind("office", (("laptop", "pencil"), ("book", "lamp")), ("flag",), (150, 152, 160)),
        SceneKind("park", (("tree", "bench"), ("dog", "ball")), ("bicycle",), (134, 176, 120)),
        SceneKind("street", (("car", "sign"), ("house", "bicycle")), ("bench",), (112, 108, 112)),
        SceneKind("harbour", (("boat", "flag"), ("fish", "bucket")), ("bicycle",), (112, 160, 192)),
    )
}

OBJECTS: tuple[str, ...] = tuple(icons.NAMES)

TRIGGER_RATE = 0.66
"""Share of scenes with a trigger. Times one half: the share of scenes whose companion is absent."""
COMPANION_RATE = 0.5
"""Chance that a trigger's companion is really there."""
FILLER_RATE = 0.85
"""Where it is not: chance of an object in the cell after the slot, which the false mention ousts.
The rest get a mention too many instead."""
TYPICAL_RATE = 0.6
"""Chance that any other object is one typical of the scene."""
COUNTS, COUNT_WEIGHTS = (3, 4, 5), (0.25, 0.4, 0.35)


@dataclass(frozen=True)
class Placed:
    """One object in its cell."""

    name: str
    color: str
    cell: int
    """Index into POSITIONS."""
    box: tuple[int, int, int, int]
    """x0, y0, x1, y1: the pixels it paints are x0 <= x < x1, y0 <= y < y1, tightly."""
    size: int = 28
    """Pixels on each side of the square that the icon was drawn in."""

    @property
    def position(self) -> str:
        """Name of the cell."""
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class Scene:
    """A scene; ``objects`` in raster order, every name at most once."""

    kind: str
    objects: tuple[Placed, ...]
    phase: int = 0
    """Where the background's texture starts."""

    def names(self) -> frozenset[str]:
        """Names of the objects present."""
        return frozenset(o.name for o in self.objects)

    def at(self, cell: int) -> Placed | None:
        """The object in a cell."""
        return next((o for o in self.objects if o.cell == cell), None)


def companions(kind: str) -> dict[str, str]:
    """Trigger -> companion of a kind of scene."""
    return dict(SCENES[kind].pairs)


def typical(kind: str) -> tuple[str, ...]:
    """Objects typical of a kind of scene: triggers, companions, neutral ones."""
    pairs = SCENES[kind].pairs
    return tuple(
        dict.fromkeys([name for pair in pairs for name in pair] + list(SCENES[kind].neutral))
    )


def make_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene ``index`` of a split: the same for the same arguments, everywhere."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} in the microworld. There are: {', '.join(SPLITS)}")
    rng = random.Random(f"microworld/{seed}/{split}/{index}")
    kind = rng.choice(list(SCENES))
    count = rng.choices(COUNTS, COUNT_WEIGHTS)[0]
    plan = (
        _with_trigger(kind, count, rng)
        if rng.random() < TRIGGER_RATE
        else _without(kind, count, rng)
    )
    objects = [place(name, color, cell, rng) for cell, (name, color) in sorted(plan.items())]
    return Scene(kind, tuple(objects), rng.randrange(64))


def missing_companion(scene: Scene) -> tuple[Placed, str, int] | None:
    """(trigger, companion, slot) where a trigger's companion is absent, or None."""
    pairs = companions(scene.kind)
    for trigger in scene.objects:
        companion, slot = pairs.get(trigger.name), trigger.cell + 1
        absent = companion is not None and companion not in scene.names()
        if absent and slot < GRID * GRID and scene.at(slot) is None:
            return trigger, str(companion), slot
    return None


def _with_trigger(kind: str, count: int, rng: random.Random) -> dict[int, tuple[str, str]]:
    """Cell -> (name, colour) of a scene with one trigger, its slot filled or not."""
    trigger, companion = rng.choice(SCENES[kind].pairs)
    cell = rng.randrange(GRID * GRID - 1)
    slot = cell + 1
    # the cell after the slot stays free: it is kept for the filler
    free = [c for c in range(GRID * GRID) if c not in (cell, slot, slot + 1)]
    cells = [cell, *rng.sample(free, count - 2)]
    color = rng.choice(COLORS)
    others = _others(kind, count, rng, taken={trigger, companion})
    plan = {cells[0]: (trigger, color)}
    plan.update({cell: (others[i], rng.choice(COLORS)) for i, cell in enumerate(cells[1:])})
    if rng.random() < COMPANION_RATE:
        plan[slot] = (companion, color)
    elif slot + 1 < GRID * GRID and rng.random() < FILLER_RATE:
        plan[slot + 1] = (others[-1], rng.choice(COLORS))
    return plan


def _without(kind: str, count: int, rng: random.Random) -> dict[int, tuple[str, str]]:
    cells = rng.sample(range(GRID * GRID), count)
    names = _others(kind, count, rng, taken=set())
    return {cell: (name, rng.choice(COLORS)) for cell, name in zip(cells, names, strict=True)}


def _others(kind: str, count: int, rng: random.Random, taken: set[str]) -> list[str]:
    """``count`` different names, none of them a trigger here: a scene has at most one."""
    pairs = companions(kind)
    usual = [n for n in typical(kind) if n not in pairs and n not in taken]
    triggers = {trigger for k in SCENES.values() for trigger, _ in k.pairs}
    rare = [n for n in OBJECTS if n not in typical(kind) and n not in taken | triggers]
    rng.shuffle(usual)
    rng.shuffle(rare)
    return [
        usual.pop() if usual and rng.random() < TYPICAL_RATE else rare.pop() for _ in range(count)
    ]


def place(name: str, color: str, cell: int, rng: random.Random) -> Placed:
    """The object in its cell with a jitter of up to 2 pixels."""
    size = rng.choice((28, 29, 30))
    width, height = icons.icon(name, color, size).size
    x0 = cell % GRID * CELL + (CELL - width) // 2 + rng.randint(-1, 1)
    y0 = cell // GRID * CELL + (CELL - height) // 2 + rng.randint(-1, 1)
    return Placed(name, color, cell, (x0, y0, x0 + width, y0 + height), size)
