"""What every reward takes and gives, and the one place where what it gave is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from mlalign.judges._faults import ServerDown, ServerError
from mlalign.records import Example, RecordError

TOLERANCE = 1e-6
"""How far a total may be from the sum of its spans, for each unit of either."""
_FIRST = 3
"""Records named in a message about several."""


class RewardError(ValueError):
    """A reward gave what cannot be used. The message names the reward, the record and the mend."""

    def __init__(self, reward: str, record: str, problem: str, mend: str) -> None:
        super().__init__(f"reward {reward}, record {record!r}: {problem}. {mend}")
        self.reward = reward
        self.record = record


class RewardUnavailable(RuntimeError):
    """What a reward asks (a judge's server, a reward model, a detector) cannot be reached now.

    Nothing was scored, and scoring the same completions again is safe: whoever trains may wait and
    try again, or stop with its last checkpoint whole.
    """

    def __init__(self, reward: str, cause: BaseException) -> None:
        super().__init__(f"reward {reward} cannot be reached: {cause}")
        self.reward = reward


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer that the policy gave, as it was sampled."""

    example: Example
    """Image, prompt and facts that it answers."""
    text: str
    """Without special tokens; may be empty."""
    token_ids: tuple[int, ...]
    """As sampled, the end of turn included where there is one; never padding."""
    offsets: tuple[tuple[int, int], ...]
    """Characters [start, end) of ``text`` that each token spells; empty where it spells none."""
    stopped: bool
    """Whether the policy ended its turn; False: it ran into the most tokens allowed."""
    sample: int = 0
    """Number in its group."""
    length_bonus: float = 1.0
    """LLaVA-RLHF's multiplier of the length penalty for this record."""

    def __post_init__(self) -> None:
        where, size = self.example.id, len(self.text)
        if not self.token_ids:
            mend = "Give at least the end of turn, or leave it out of the group"
            raise RecordError(where, "token_ids", "a completion without a token", mend)
        if len(self.offsets) != len(self.token_ids):
            problem = f"{len(self.offsets)} for {len(self.token_ids)} tokens"
            raise RecordError(where, "offsets", problem, "Give characters [start, end) of each")
        mend = "They are characters [start, end) of it, token by token"
        if any(not 0 <= start <= end <= size for start, end in self.offsets):
            raise RecordError(where, "offsets", f"outside the answer of {size} characters", mend)
        if any(a > c or b > d for (a, b), (c, d) in pairwise(self.offsets)):
            raise RecordError(where, "offsets", "not in the order of the answer", mend)

    @property
    def id(self) -> str:
        """The record's id and the number in the group."""
        return f"{self.example.id}#{self.sample}"


class SpanScore(NamedTuple):
    """What one part of an answer is worth."""

    start: int
    end: int
    """Characters [start, end) of the answer."""
    score: float


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What one answer is worth. Where there are spans, ``total`` is the sum of their scores."""

    spans: tuple[SpanScore, ...] = ()
    total: float = 0.0
    counts: Mapping[str, float] = field(default_factory=dict)
    """What was found on the way, for the log: claims, undecided ones..."""

    @staticmethod
    def of(
        spans: Iterable[tuple[int, int, float]], counts: Mapping[str, float] | None = None
    ) -> Scored:
        """Spans (start, end, score), and their sum."""
        made = tuple(SpanScore(*span) for span in spans)
        total = math.fsum(span.score for span in made)
        return Scored(spans=made, total=total, counts=dict(counts or {}))


class Reward(Protocol):
    """What every reward offers."""

    spans: bool
    """True: its scores belong to spans. False: to the answer as a whole; no token is told apart."""

    def __call__(self, completions: Sequence[Completion]) -> list[Scored]:
        """One per completion, in order. Completions of one image are best given together."""
        ...


@dataclass(frozen=True, kw_only=True)
class RewardContext:
    """What a run lends to its rewards; each takes what it needs and refuses by name without."""

    vocabulary: Any = None
    """mlalign.objects.Vocabulary: what objects and attributes are called."""
    judge: Any = None
    """A judge of mlalign.judges."""
    score: Callable[[Sequence[Any]], Sequence[Sequence[float]]] | None = None
    """The reward model's call: ``reward_model.Query`` -> a score for each of its spans."""
    detector: Any = None
    """Image -> what is seen in it; see ``_detector.Detector``."""
    split: Callable[[str], Sequence[Any]] | None = None
    """Text -> claims with ``start``, ``end`` and ``question``; None: by rule (``_claims``)."""


def checked(name: str, reward: Reward, completions: Sequence[Completion]) -> list[Scored]:
    """What ``reward`` gives to ``completions``, looked through; spans in text order.

    Raises RewardError for another number of scores than completions, a score that is no finite
    number, spans that overlap, are empty, blank or outside the answer, a total that is not the sum
    of its spans, spans of a reward that has none, and a server that refuses what it is asked;
    RewardUnavailable where what it asks is down.
    """
    if not completions:
        return []
    first = ", ".join(c.id for c in completions[:_FIRST])
    try:
        given = reward(completions)
    except (ServerDown, ConnectionError, TimeoutError) as error:
        raise RewardUnavailable(name, error) from error
    except ServerError as error:
        mend = "No wait mends this; the last checkpoint is whole, and a rerun goes on from it"
        raise RewardError(name, first, f"the server refuses: {error}", mend) from error
    if len(given) != len(completions):
        problem = f"gave {len(given)} scores for {len(completions)} completions"
        raise RewardError(name, first, problem, "Return one Scored per completion, in order")
    return [_checked(name, reward.spans, c, s) for c, s in zip(completions, given, strict=True)]


def _checked(name: str, has_spans: bool, completion: Completion, scored: Scored) -> Scored:
    def refuse(problem: str, mend: str) -> RewardError:
        return RewardError(name, completion.id, problem, mend)

    spans = tuple(sorted((SpanScore(*s) for s in scored.spans), key=lambda s: (s.start, s.end)))
    for score in (scored.total, *(s.score for s in spans)):
        if not math.isfinite(score):
            mend = "Mend the reward: where it cannot tell, it gives 0 and counts it"
            raise refuse(f"a score of {score}", mend)
    if not has_spans:
        if spans:
            raise refuse("gave spans, but is a reward of the whole answer", "Set spans = True")
        return scored
    text, at = completion.text, 0
    for start, end, _ in spans:
        where = f"span {start}:{end}"
        if not 0 <= start < end <= len(text):
            problem = f"{where} is outside the answer of {len(text)} characters"
            raise refuse(problem, "Spans are characters [start, end) of it, none of them empty")
        if start < at:
            mend = "Merge what shares characters into one span with the sum of the scores"
            raise refuse(f"{where} overlaps the span before it", mend)
        if not text[start:end].strip():
            raise refuse(f"{where} holds nothing but blanks", "No token can be given its score")
        at = end
    summed = math.fsum(s.score for s in spans)
    if abs(summed - scored.total) > TOLERANCE * max(1.0, abs(summed)):
        problem = f"total {scored.total:g}, but its spans sum to {summed:g}"
        raise refuse(problem, "Make it with Scored.of(spans)")
    return Scored(spans=spans, total=summed, counts=scored.counts)
