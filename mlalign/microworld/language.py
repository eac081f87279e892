"""What is said of a scene: captions in four styles, their parser, the words there are. No torch.

A caption names each position before its object, in raster order, so that writing a mention is one
look at one cell. ``sft_mentions`` is where the prior lives: the captions that the base model learns
from claim companions that are not there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlalign.microworld.scenes import COLORS, OBJECTS, POSITIONS, SCENES, Scene, missing_companion

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
    """The yes/no question that a mention answers: "Is there a red pot at the top left?"; without
    the colour where the mention has none."""
    thing = f"{mention.color} {mention.name}" if mention.color else mention.name
    return f"Is there a {thing} at the {mention.position}?"


def presence_question(name: str) -> str:
    """POPE's question: "Is there a pot in the image?"."""
    return f"Is there a {name} in the image?"


YES, NO = "Yes.", "No."
NOTHING = "Nothing."


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
