"""Coverage: how much of what matters in the image an answer mentions, lest silence wins.

    reward = |salient objects mentioned| / |salient objects|                a share, 0 to 1

Salient are the record's objects with a box of at least ``min_area`` of the image (or without a box)
and those that at least ``min_captions`` of its captions mention, as far as the vocabulary has them.
An image without any gives 0, counted as ``nothing``: a group of answers to it differs in nothing
here.

It belongs to the answer as a whole, never to a span: credit for a word that was said would pay for
saying more words. It does not ask whether what is said is true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from mlalign.images import image_size
from mlalign.records import Example, ObjectFact
from mlalign.rewards._reward import Completion, RewardContext, Scored


class Settings(BaseModel):
    """What is salient."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    min_area: float = Field(default=0.0, ge=0, le=1)
    """Least share of the image that an object's box covers."""
    min_captions: int | None = Field(default=1, ge=1)
    """Captions that must mention an object which is not among the record's objects, or too small;
    None: captions are not read."""


class Coverage:
    """The reward."""

    Settings = Settings
    spans = False

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        if context.vocabulary is None:
            raise ValueError("reward coverage needs a vocabulary: give data.vocabulary")
        self.settings = settings
        self.vocabulary = context.vocabulary

    def __call__(self, completions: Sequence[Completion]) -> list[Scored]:
        """Counts: salient, covered, nothing. Raises RecordError for an image that cannot be
        read."""
        wanted: dict[str, frozenset[str]] = {}
        scored = []
        for completion in completions:
            example = completion.example
            if example.id not in wanted:
                wanted[example.id] = self.salient(example)
            salient = wanted[example.id]
            said = {span.name for span in self.vocabulary.objects(completion.text)}
            covered = len(said & salient)
            counts = {
                "salient": float(len(salient)),
                "covered": float(covered),
                "nothing": float(not salient),
            }
            total = covered / len(salient) if salient else 0.0
            scored.append(Scored(total=total, counts=counts))
        return scored

    def salient(self, example: Example) -> frozenset[str]:
        """The names that an answer should mention."""
        known = set(self.vocabulary.names)
        names = {o.name for o in example.facts.objects if o.name in known and self._big(example, o)}
        least = self.settings.min_captions
        if least is not None:
            mentioned = Counter(
                name
                for caption in example.facts.captions
                for name in {span.name for span in self.vocabulary.objects(caption)}
            )
            names |= {name for name, captions in mentioned.items() if captions >= least}
        return frozenset(names)

    def _big(self, example: Example, fact: ObjectFact) -> bool:
        if fact.box is None or self.settings.min_area == 0:
            return True
        x0, y0, x1, y1 = fact.box
        width, height = image_size(example.image, example.id)
        return (x1 - x0) * (y1 - y0) >= self.settings.min_area * width * height


METHOD = Coverage
