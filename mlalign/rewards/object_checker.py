"""Object checker: are the objects that an answer mentions in the image?

    score(mention) = ``right`` where the object is there, ``wrong`` where it is not
    reward         = sum over mentions, repeats counted; the span is the word

``against: facts`` is CHAIR's rule (Rohrbach et al., 2018) as a reward: what is there are the
record's objects and those that its captions mention, and everything else of the vocabulary is not.
``detector`` asks an object detector instead: there from ``present`` on, not there up to ``absent``,
undecided between them and for classes that it does not know. ``both`` believes the facts as far as
they go (what they list; what they leave out, where they are exhaustive) and asks the detector for
the rest.

It sees no attribute, number or relation, and no word outside the vocabulary. Nothing is gained by
saying less but for what is wrong: read it with ``coverage``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mlalign.records import Example
from mlalign.rewards._detector import Sightings, find_detector
from mlalign.rewards._reward import Completion, RewardContext, Scored, SpanScore


class Settings(BaseModel):
    """What is believed, and what a mention is worth."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    against: Literal["facts", "detector", "both"] = "facts"
    """Who says what is in the image."""
    captions: bool = True
    """Objects that the record's captions mention are there, too."""
    right: float = 0.0
    """Score of an object that is there."""
    wrong: float = -1.0
    """Score of one that is not."""
    undecided: float = 0.0
    """Score of one of which nobody knows; counted."""
    detector: str | None = None
    """Folder or Hub id of an object detector of transformers, or package.module:Name of a callable;
    None: the run's own."""
    present: float = Field(default=0.5, gt=0, le=1)
    """Least detection score at which an object is there."""
    absent: float = Field(default=0.1, ge=0, le=1)
    """Greatest detection score at which it is not."""

    @model_validator(mode="after")
    def _in_order(self) -> Settings:
        if self.absent >= self.present:
            raise ValueError(f"absent {self.absent:g} must be below present {self.present:g}")
        return self


class ObjectChecker:
    """The reward. ``context.vocabulary`` finds the mentions."""

    Settings = Settings
    spans = True

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        if context.vocabulary is None:
            raise ValueError("reward object_checker needs a vocabulary: give data.vocabulary")
        self.settings = settings
        self.vocabulary = context.vocabulary
        self._sightings: Sightings | None = None
        if settings.against != "facts":
            detector = context.detector
            if settings.detector is not None:
                detector = find_detector(settings.detector)
            if detector is None:
                raise ValueError(
                    f"reward object_checker against {settings.against} has no detector: set its "
                    "key detector"
                )
            self._sightings = Sightings(detector, self.vocabulary)

    def __call__(self, completions: Sequence[Completion]) -> list[Scored]:
        """Counts: mentions, false, undecided. Raises RewardError for what a detector gave amiss,
        RecordError for an image that cannot be read."""
        verdicts: dict[tuple[str, str], bool | None] = {}
        scored = []
        for completion in completions:
            example = completion.example
            spans, counts = [], Counter({"mentions": 0, "false": 0, "undecided": 0})
            for span in self.vocabulary.objects(completion.text):
                key = (example.id, span.name)
                if key not in verdicts:
                    verdicts[key] = self.there(example, span.name)
                spans.append(SpanScore(span.start, span.end, self._score(verdicts[key])))
                counts["mentions"] += 1
                counts["false"] += verdicts[key] is False
                counts["undecided"] += verdicts[key] is None
            scored.append(Scored.of(spans, {k: float(v) for k, v in counts.items()}))
        return scored

    def there(self, example: Example, name: str) -> bool | None:
        """Whether the image holds the object; None: nobody knows."""
        against, facts = self.settings.against, example.facts
        if against != "detector":
            if name in self._listed(example):
                return True
            if against == "facts" or facts.exhaustive:
                return False
        assert self._sightings is not None
        seen = self._sightings.score(example, name)
        if seen is None or self.settings.absent < seen < self.settings.present:
            return None
        return seen >= self.settings.present

    def _listed(self, example: Example) -> frozenset[str]:
        names = example.facts.names()
        if self.settings.captions:
            for caption in example.facts.captions:
                names |= {span.name for span in self.vocabulary.objects(caption)}
        return names

    def _score(self, verdict: bool | None) -> float:
        if verdict is None:
            return self.settings.undecided
        return self.settings.right if verdict else self.settings.wrong


METHOD = ObjectChecker
