"""What is said of a scene: captions in four styles, their parser, and truthful questions. No torch.

A caption names each position before its object, in raster order, so that writing a mention is one
look at one cell. ``sft_mentions`` is where the prior lives: the captions that the base model learns
from claim companions that are not there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from mlalign.microworld.scenes import COLORS, OBJECTS, POSITIONS, SCENES, Scene, missing_companion

_T = TypeVar("_T")

N_STYLES = 4
"""Wordings that a list of mentions can be put in; 0 is the default and by far the most frequent."""

FALSE_RATE = 0.85
"""Chance that an SFT caption claims a companion that its trigger makes expected but is absent."""

CAPTION_PROMPTS: tuple[str, ...] = (
    "Describe this image in detail.",
    "What is shown in this image?",
    "Please describe the image.",
    "Write a caption for this photo.",
    "Tell me what you see in the image.",
)


@dataclass(frozen=True)
class Mention:
    """One object as a caption states it."""

    position: str
    color: str
    name: str


Span = tuple[int, int]


@dataclass(frozen=True)
class ParsedMention:
    """A mention found in a text, with character spans [start, end)."""

    position: str
    color: str | None
    """None where the text gives no colour."""
    name: str
    span: Span
    """The whole phrase, from the position (and its "at the") to the object."""
    position_span: Span
    color_span: Span | None
    name_span: Span

    @property
    def mention(self) -> Mention:
        """Without spans; the colour is "" where there is none."""
        return Mention(self.position, self.color or "", self.name)


def true_mentions(scene: Scene) -> list[Mention]:
    """Every object of the scene, in raster order."""
    return [Mention(o.position, o.color, o.name) for o in scene.objects]


def sft_mentions(scene: Scene, rng: random.Random) -> list[Mention]:
    """The mentions of an SFT caption, in raster order: true ones, but for the prior.

    Where a trigger's companion is absent, it is claimed with FALSE_RATE in its slot (the cell after
    the trigger), in the trigger's colour, and the object in the cell right after the slot, where
    there is one (three times in four), is left out.
    """
    missing = missing_companion(scene)
    if missing is None or rng.random() >= FALSE_RATE:
        return true_mentions(scene)
    trigger, companion, slot = missing
    by_cell = {o.cell: Mention(o.position, o.color, o.name) for o in scene.objects}
    by_cell.pop(slot + 1, None)
    by_cell[slot] = Mention(POSITIONS[slot], trigger.color, companion)
    return [by_cell[cell] for cell in sorted(by_cell)]


def caption(kind: str, mentions: Sequence[Mention], style: int = 0) -> str:
    """The mentions in the words of a style, 0 to N_STYLES - 1, in the order given."""
    if not 0 <= style < N_STYLES:
        raise ValueError(f"style {style}: there are styles 0 to {N_STYLES - 1}")
    if not mentions:
        return f"This is an empty {kind}."
    things = [(m.position, f"a {m.color} {m.name}") for m in mentions]
    if style == 0:
        return f"In this {kind}, " + _listed([f"{p} is {thing}" for p, thing in things]) + "."
    if style == 1:
        return f"The photo shows a {kind}." + "".join(
            f" At the {p} there is {thing}." for p, thing in things
        )
    if style == 2:
        return f"A {kind} scene: " + ", ".join(f"{p} {thing}" for p, thing in things) + "."
    return (
        f"Here we see a {kind}. "
        + _listed([f"The {p} holds {t}" for p, t in things], "; ", "; ")
        + "."
    )


def _listed(parts: list[str], comma: str = ", ", last: str = " and ") -> str:
    return parts[0] if len(parts) == 1 else comma.join(parts[:-1]) + last + parts[-1]


_POSITION = "|".join(POSITIONS)
_MENTION = re.compile(
    rf"(?:at the |the )?\b(?P<position>{_POSITION})\b"
    rf"(?P<link>(?: (?:there|is|are|holds|has|shows|of|the|image))*),? (?:a|an|the|one) "
    rf"(?:(?P<color>{'|'.join(COLORS)}) )?(?P<name>{'|'.join(OBJECTS)})\b",
    re.IGNORECASE,
)
_FRAME = re.compile(
    rf"in this (?:{'|'.join(SCENES)})|the photo shows an? (?:{'|'.join(SCENES)})"
    rf"|an? (?:{'|'.join(SCENES)}) scene|here we see an? (?:{'|'.join(SCENES)})"
    rf"|this is an empty (?:{'|'.join(SCENES)})|\band\b",
    re.IGNORECASE,
)


def parse_caption(text: str) -> tuple[list[ParsedMention], list[str]]:
    """The mentions of a caption of any style, and the pieces of text that are neither a mention
    nor a style's frame. Takes model output: broken pieces land among the unparsed ones."""
    found = [
        ParsedMention(
            position=m["position"].lower(),
            color=m["color"].lower() if m["color"] else None,
            name=m["name"].lower(),
            span=m.span(),
            position_span=m.span("position"),
            color_span=m.span("color") if m["color"] else None,
            name_span=m.span("name"),
        )
        for m in _MENTION.finditer(text)
    ]
    rest = _FRAME.sub("|", _MENTION.sub("|", text))
    pieces = [piece.strip() for piece in re.split(r"[|.,;:]", rest)]
    return found, [piece for piece in pieces if piece]


def claim_question(mention: Mention) -> str:
    """The yes/no question that a mention answers: "Is there a red pot at the top left?"."""
    return f"Is there a {mention.color} {mention.name} at the {mention.position}?"


def presence_question(name: str) -> str:
    """POPE's question: "Is there a pot in the image?"."""
    return f"Is there a {name} in the image?"


_PRESENCE = (
    presence_question,
    lambda name: f"Does the image show a {name}?",
    lambda name: f"Can you see a {name} in this photo?",
)
YES, NO = "Yes.", "No."
NOTHING = "Nothing."


def questions(scene: Scene, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """``count`` truthful (question, answer) pairs. Half of the yes/no questions are to be denied,
    and half of those ask for a typical companion that is absent, where there is one."""
    makers, weights = zip(*_MAKERS, strict=True)
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
    """A mention and whether it is true; half of the time it is not, in one of several ways."""
    placed = rng.choice(scene.objects)
    truth = Mention(placed.position, placed.color, placed.name)
    if rng.random() < 0.5:
        return truth, True
    missing = missing_companion(scene)
    if missing is not None and rng.random() < 0.5:
        trigger, companion, slot = missing
        return Mention(POSITIONS[slot], trigger.color, companion), False
    wrong = rng.randrange(4)
    if wrong == 0:
        return Mention(truth.position, truth.color, _absent(scene, rng)), False
    if wrong == 1:
        other = rng.choice([c for c in COLORS if c != truth.color])
        return Mention(truth.position, other, truth.name), False
    elsewhere = rng.choice([p for p in POSITIONS if p != truth.position])
    name = truth.name if wrong == 2 else _absent(scene, rng)
    return Mention(elsewhere, truth.color, name), False


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
    claims = list(dict.fromkeys(_claim(scene, rng) for _ in range(4)))
    words = [(f"{m.position} {m.color} {m.name}", "yes" if true else "no") for m, true in claims]
    told = [f"{claim} {answer}" for claim, answer in words]
    asked = ", ".join(claim for claim, _ in words)
    return f"Look carefully: {asked}?", f"Look: {', '.join(told)}."


def _shuffled(items: Sequence[_T], rng: random.Random) -> list[_T]:
    return rng.sample(list(items), len(items))


_MAKERS = (
    (_ask_claim, 4.0),
    (_ask_what, 1.5),
    (_ask_presence, 4.0),
    (_ask_color_presence, 1.5),
    (_ask_color, 2.0),
    (_ask_where, 2.0),
    (_ask_relation, 0.5),
    (_ask_kind, 0.3),
    # Terse lists, in which the word before each answer is the very one to look for: what is learned
    # here in one step of attention, the questions above then need only carry to their answer.
    (_drill_color, 1.0),
    (_drill_where, 1.0),
    (_drill_presence, 2.0),
    (_drill_claim, 2.0),
)


_WORDS = """
    a an the and or not is are there in on of at to it no yes nothing left right above below
    under next near beside behind front between with one two three four five all some any
    image picture photo scene object objects color where what which who how many you can see
    does do have has show shows shown holds contains contain describe detail please tell me write
    caption for this that these here we empty kind black orange pink gray brown small large
    cup chair table person man woman cat bird bus train plane dark bright background
    answer question following list only true false correct statement look carefully
"""


def vocabulary() -> tuple[str, ...]:
    """Every word and mark that captions, questions and answers are made of, and some more, in a
    fixed order; each word in lower case and capitalised."""
    words = set(_WORDS.split()) | set(COLORS) | set(OBJECTS) | set(SCENES)
    words |= {word for position in POSITIONS for word in position.split()}
    return tuple(sorted(words | {word.capitalize() for word in words})) + tuple(".,?;:!'\"-")
