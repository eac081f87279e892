"""POVID's preferences: the reference caption against itself with plausible errors put in.

Zhou et al., 2402.11411, section 3.1: the dispreferred answer is the ground truth with objects that
typically occur together but are absent, wrong attributes and wrong relations. There GPT-4V writes
the errors; here rules do, from the facts and a vocabulary's companions (``origin.how = "rule"``).
The errors stand at random places, and mostly take the place of a true mention, so that neither
counting mentions nor the words alone tell the sides apart.

Not here: the second half of the method, answers of the model to a noised image, which is a view at
training time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_builders._context import BuildContext
from data_builders._language import Corruption
from data_builders._pairs import (
    CHOSEN_MENTIONS,
    COUNTS_DIFFER,
    REJECTED_MENTIONS,
    EqualCounts,
    differing_spans,
)
from mlalign.records import Example, Preference, Skip

KINDS = ("object", "attribute", "relation")
NO_CAPTION = "no reference caption"
NOTHING_TO_CORRUPT = "nothing in the captions that a rule can make wrong"


class Settings(BaseModel):
    """How many errors, and of what kind."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    corruptions: int = Field(default=1, ge=1, le=4)
    """Errors put into a caption; fewer where a caption has no room for more."""
    kinds: dict[str, float] = {"object": 0.7, "attribute": 0.15, "relation": 0.15}
    """How often each kind of error is tried first; one that fits nowhere gives way to another."""
    pairs_per_image: int = Field(default=1, ge=1)
    """Pairs with different errors made of one image."""
    uneven: float = Field(default=0.1, ge=0, le=0.5)
    """Share of object errors that join or cost a mention instead of replacing one, half each where
    the language can do both."""
    equal_counts: float = Field(default=0.8, ge=0, le=1)
    """Least share of pairs whose sides mention equally many objects."""
    chunk: int = Field(default=64, ge=1)
    """Examples per call."""

    @field_validator("kinds")
    @classmethod
    def _known(cls, kinds: dict[str, float]) -> dict[str, float]:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or min(kinds.values(), default=0) < 0 or sum(kinds.values()) <= 0:
            raise ValueError(
                f"kinds are weights of {', '.join(KINDS)}, at least one of them positive"
            )
        return kinds


class Povid:
    """The builder."""

    Settings = Settings
    name = "povid"
    expected = frozenset({NOTHING_TO_CORRUPT, COUNTS_DIFFER})

    def __init__(self, settings: Settings, context: BuildContext) -> None:
        self.settings = settings
        self.context = context
        self.chunk = settings.chunk
        self.words = context.words()
        self._cap = EqualCounts(settings.equal_counts)
        self._made: Counter[str] = Counter()

    def build_many(self, chunk: Sequence[Example]) -> Iterator[Preference | Skip]:
        """Pairs of each example, one after another; nothing is generated."""
        for example in chunk:
            for outcome in self._build(example):
                if isinstance(outcome, Skip):
                    yield outcome
                else:
                    yield from self._cap.admit(outcome)

    def finish(self) -> Iterator[Preference | Skip]:
        """Pairs with unequal counts that found no room."""
        yield from self._cap.finish()

    def report(self) -> dict[str, Any]:
        """Errors put in, by kind."""
        return {"corruptions": dict(self._made)}

    def _build(self, example: Example) -> Iterator[Preference | Skip]:
        if not example.facts.captions:
            yield Skip(id=example.id, reason=NO_CAPTION, detail="facts.captions is empty")
            return
        made: set[str] = set()
        for number in range(self.settings.pairs_per_image):
            rng = self.context.rng("povid", example.id, number)
            found = self._corrupt(example, rng)
            if found is None or found[1] in made:
                continue
            made.add(found[1])
            yield self._pair(example, len(made) - 1, *found)
        if not made:
            yield Skip(id=example.id, reason=NOTHING_TO_CORRUPT, detail=example.facts.captions[0])

    def _corrupt(
        self, example: Example, rng: random.Random
    ) -> tuple[str, str, list[Corruption]] | None:
        """(caption, corrupted caption, errors) of the first caption, in random order, that allows
        the kind drawn first, else of any kind."""
        captions = [self.words.tidy(caption) for caption in example.facts.captions]
        rng.shuffle(captions)
        for kind in self._kinds(rng):
            for caption in captions:
                if not self.words.mentions(caption):
                    continue
                done = self._apply(caption, example, kind, rng, ())
                if done is not None:
                    return caption, *self._more(caption, done, example, rng)
        return None

    def _more(
        self, caption: str, first: Corruption, example: Example, rng: random.Random
    ) -> tuple[str, list[Corruption]]:
        errors, text = [first], first.text
        while len(errors) < self.settings.corruptions:
            avoid = [word for e in errors for word in (e.word, e.was) if word]
            tries = (self._apply(text, example, kind, rng, avoid) for kind in self._kinds(rng))
            more = next((c for c in tries if c is not None and c.text != caption), None)
            if more is None:
                break
            errors.append(more)
            text = more.text
        return text, errors

    def _apply(
        self, text: str, example: Example, kind: str, rng: random.Random, avoid: Sequence[str]
    ) -> Corruption | None:
        change = 0
        if kind == "object" and rng.random() < self.settings.uneven:
            change = rng.choice((-1, 1))
        done = self.words.corrupted(text, example.facts, kind, rng, avoid, change)
        return done if done is not None and done.text != text else None

    def _kinds(self, rng: random.Random) -> list[str]:
        """The kinds in a random order that follows their weights; those of weight 0 left out."""
        left = {kind: weight for kind, weight in self.settings.kinds.items() if weight > 0}
        order = []
        while left:
            kind = rng.choices(list(left), list(left.values()))[0]
            order.append(kind)
            del left[kind]
        return order

    def _pair(
        self, example: Example, number: int, chosen: str, rejected: str, errors: list[Corruption]
    ) -> Preference:
        self._made.update(error.kind for error in errors)
        label = errors[0].kind if len(errors) == 1 else "edit"
        return Preference(
            id=f"{self.name}-{example.id}-{number}",
            image=example.image,
            image_sha256=example.image_sha256,
            prompt=example.prompt,
            chosen=chosen,
            rejected=rejected,
            segments=differing_spans(chosen, rejected, label),
            scores={
                CHOSEN_MENTIONS: float(self.words.mentions(chosen)),
                REJECTED_MENTIONS: float(self.words.mentions(rejected)),
            },
            facts=example.facts,
            origin={
                "source": example.source,
                "example": example.id,
                "builder": self.name,
                "how": self.words.how,
                "seed": self.context.seed,
                "errors": [{"kind": e.kind, "put_in": e.word, "instead_of": e.was} for e in errors],
            },
        )


METHOD = Povid
