"""POVID's preferences: the reference caption against itself with plausible errors put in.

Zhou et al., 2402.11411, section 3.1: the dispreferred answer is the ground truth with objects that
typically occur together but are absent, wrong attributes and wrong relations. There GPT-4V writes
the errors. Here the run's writer does, with an instruction for each kind; without one rules do,
from the facts and a vocabulary's companions (``origin.how``). By rule the errors stand at random
places, and mostly take the place of a true mention, so that neither counting mentions nor the words
alone tell the sides apart.

Not here: the second half of the method, answers of the model to a noised image, which is a view at
training time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_builders._context import BuildContext
from data_builders._jobs import Corrupt, Failed, Work, in_step
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
NOTHING_TO_CORRUPT = "nothing in the captions that can be made wrong"


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
        self.scribe = context.scribe()
        self.seen: Counter[str] = Counter()

    def build_many(self, chunk: Sequence[Example]) -> Iterator[Preference | Skip]:
        """Pairs of each example, in order; no answer of the model is drawn."""
        for made in in_step([self._build(example) for example in chunk], self.scribe.do):
            yield from made

    def finish(self, candidates: Iterable[Preference]) -> Iterator[Preference | Skip]:
        """All pairs but those with unequal counts that there is no room for."""
        yield from map(EqualCounts(self.settings.equal_counts, candidates).admit, candidates)

    def report(self, seen: Counter[str]) -> dict[str, Any]:
        """Errors put in, by kind."""
        return {"corruptions": dict(seen)}

    def _build(self, example: Example) -> Work[list[Preference | Skip]]:
        if not example.facts.captions:
            return [Skip(id=example.id, reason=NO_CAPTION, detail="facts.captions is empty")]
        made: list[Preference | Skip] = []
        texts: set[str] = set()
        failed: Failed | None = None
        for number in range(self.settings.pairs_per_image):
            rng = self.context.rng("povid", example.id, number)
            found = yield from self._corrupt(example, rng)
            if isinstance(found, Failed):
                failed = found
            elif found is not None and found[1] not in texts:
                made.append(self._pair(example, len(texts), *found))
                texts.add(found[1])
        if failed is not None:
            made.append(Skip(id=example.id, reason=failed.reason, detail=failed.detail))
        elif not made:
            caption = example.facts.captions[0]
            made.append(Skip(id=example.id, reason=NOTHING_TO_CORRUPT, detail=caption))
        return made

    def _corrupt(
        self, example: Example, rng: random.Random
    ) -> Work[tuple[str, str, list[Corruption]] | Failed | None]:
        """(caption, corrupted caption, errors) of the first caption, in random order, that allows
        the kind drawn first, else of any kind."""
        captions = [self.words.tidy(caption) for caption in example.facts.captions]
        rng.shuffle(captions)
        for kind in self._kinds(rng):
            for caption in captions:
                # A rule can only work on what the vocabulary knows.
                if self.context.writer is None and not self.words.mentions(caption):
                    continue
                done = yield from self._apply(caption, example, kind, rng, ())
                if isinstance(done, Failed):
                    return done
                if done is not None:
                    errors = yield from self._more(caption, done, example, rng)
                    if isinstance(errors, Failed):
                        return errors
                    return caption, errors[-1].text, errors
        return None

    def _more(
        self, caption: str, first: Corruption, example: Example, rng: random.Random
    ) -> Work[list[Corruption] | Failed]:
        """The first error and those put in after it; the last one's text has them all."""
        errors = [first]
        while len(errors) < self.settings.corruptions:
            avoid = [word for e in errors for word in (e.word, e.was) if word]
            more: Corruption | None = None
            for kind in self._kinds(rng):
                done = yield from self._apply(errors[-1].text, example, kind, rng, avoid)
                if isinstance(done, Failed):
                    return done
                if done is not None and done.text != caption:
                    more = done
                    break
            if more is None:
                break
            errors.append(more)
        return errors

    def _apply(
        self, text: str, example: Example, kind: str, rng: random.Random, avoid: Sequence[str]
    ) -> Work[Corruption | Failed | None]:
        change = 0
        if kind == "object" and rng.random() < self.settings.uneven:
            change = rng.choice((-1, 1))
        done = yield Corrupt(
            example=example, text=text, kind=kind, rng=rng, avoid=avoid, change=change
        )
        return None if isinstance(done, Corruption) and done.text == text else done

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
        self.seen.update(error.kind for error in errors)
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
                **self.scribe.origin(),
                "seed": self.context.seed,
                "errors": [{"kind": e.kind, "put_in": e.word, "instead_of": e.was} for e in errors],
            },
        )


METHOD = Povid
