"""Reward model: what a trained scalar head says of an answer, or of each of its sentences.

``form: answer`` (LLaVA-RLHF, 2309.14525): one score, of the answer as a whole; no token is told
apart. ``form: sentence`` (ViGoR, 2402.06118): a score at the end of each sentence, its span the
sentence;

    reward = sum over sentences         or their mean, with ``average``: length then earns nothing

    score  = (head - offset) * scale    offset: e.g. the mean over held-out answers

The model is called through ``context.score``: a sequence of ``Query`` in, for each a score of each
of its spans out. What the model is shown (the image, facts in the prompt) is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from mlalign.objects import sentences
from mlalign.rewards._reward import Completion, RewardContext, RewardError, Scored


class Settings(BaseModel):
    """What is scored, and in which units."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    form: Literal["answer", "sentence"] = "answer"
    average: bool = False
    """Sentences: the mean over them, not the sum; each span has its share."""
    offset: float = 0.0
    """Taken off every score of the model."""
    scale: float = 1.0
    """Multiplies what is left."""


class Query(NamedTuple):
    """What the model is asked."""

    completion: Completion
    spans: tuple[tuple[int, int], ...]
    """Characters [start, end) of the answer, in order; a score is read at the end of each. The
    whole answer (0, length) where it is scored as one, also when it is empty."""


class RewardModel:
    """The reward."""

    Settings = Settings

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        if context.score is None:
            raise ValueError("reward reward_model has no model: train one, or name its folder")
        self.settings = settings
        self.spans = settings.form == "sentence"
        self.score = context.score

    def __call__(self, completions: Sequence[Completion]) -> list[Scored]:
        """Raises RewardError, naming the record, for another number of scores than spans. Counts:
        sentences. A blank answer has no sentence, and the model is not asked."""
        queries = [Query(c, self._parts(c.text)) for c in completions]
        asked = [query for query in queries if query.spans]
        given = list(self.score(asked)) if asked else []
        if len(given) != len(asked):
            first = ", ".join(query.completion.id for query in asked[:3])
            problem = f"the model gave scores for {len(given)} of {len(asked)} answers"
            raise RewardError("reward_model", first, problem, "Give a list of scores for each")
        scores = iter(given)
        return [self._scored(query, next(scores) if query.spans else ()) for query in queries]

    def _parts(self, text: str) -> tuple[tuple[int, int], ...]:
        return tuple(sentences(text)) if self.spans else ((0, len(text)),)

    def _scored(self, query: Query, given: Sequence[float]) -> Scored:
        if len(given) != len(query.spans):
            problem = f"the model gave {len(given)} scores for {len(query.spans)} spans"
            mend = "Give a score for each span, in order"
            raise RewardError("reward_model", query.completion.id, problem, mend)
        worth = [(float(score) - self.settings.offset) * self.settings.scale for score in given]
        if not self.spans:
            return Scored(total=worth[0])
        share = len(worth) if self.settings.average else 1
        parts = zip(query.spans, worth, strict=True)
        spans = [(start, end, value / share) for (start, end), value in parts]
        return Scored.of(spans, {"sentences": float(len(spans))})


METHOD = RewardModel
