"""VLFeedback's preferences, which Silkie was trained on: answers of a pool, rated on three aspects.

Li et al., 2312.10665, section 2: each instruction is answered by four models of a pool of twelve;
GPT-4V rates each answer 1 to 5, with a reason, on helpfulness, visual faithfulness and ethical
considerations. Here the run's writer rates; without one a rule over the facts does (``_rating``,
``origin.how``).

    rating(answer) = mean of the three aspects
    pairs = all two answers of an instruction whose ratings differ; the higher one is chosen

Answers that lack a rating are left out and counted, as are ties and answers with the same words.
Not here: filters on the margin or on length, of which the paper has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_builders._context import BuildContext
from data_builders._correcting import Desk
from data_builders._jobs import Failed
from data_builders._judging import claims
from data_builders._pairs import CHOSEN_MENTIONS, REJECTED_MENTIONS, differing_spans
from data_builders._rating import Rated, rate_by_rule, rate_by_writer
from mlalign.generate import Decoding, Request, generate
from mlalign.records import Example, Preference, Skip

TOO_FEW = "fewer than two different answers"
ALL_TIED = "all answers are rated alike"
RULE_NOTE = "rule (ethical considerations: a constant)"


class Member(BaseModel):
    """One of the pool: a model and how it answers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str | None = None
    """Folder or Hub id; None: the run's model."""
    image: Literal["pad", "crop"] = "crop"
    """How a model of its own is given images; the run's model has its own setting."""
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)


class Settings(BaseModel):
    """The pool, and how its answers are rated and paired."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    pool: tuple[Member, ...] = Field(
        default=tuple(Member(temperature=t) for t in (0.0, 0.5, 1.0, 1.5)), min_length=2
    )
    """Who answers: folders or Hub ids, or ``{model, temperature, top_p, image}``. Default: the
    run's model at four temperatures. All models are held in memory together."""
    answers_per_prompt: int = Field(default=4, ge=2)
    """Members drawn from the pool for each prompt; all where it has no more."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer at most."""
    batch_size: int = Field(default=32, ge=1)
    """Answers per generation batch."""
    show: Literal["image", "facts", "both"] = "image"
    """What the writer rates by: the image, as in the paper, what is known of it, or both."""
    pairs_per_prompt: int | None = Field(default=None, ge=1)
    """Untied pairs kept of a prompt, drawn at random; None: all of them."""
    chunk: int = Field(default=64, ge=1)
    """Examples per call."""

    @field_validator("pool", mode="before")
    @classmethod
    def _names(cls, pool: Any) -> Any:
        if not isinstance(pool, (list, tuple)):
            return pool
        return tuple({"model": m} if isinstance(m, str) else m for m in pool)


class VlFeedback:
    """The builder. ``context.writer`` rates; without one, the facts do."""

    Settings = Settings
    name = "vlfeedback"
    expected = frozenset({TOO_FEW, ALL_TIED})

    def __init__(self, settings: Settings, context: BuildContext) -> None:
        self.settings = settings
        self.context = context
        self.chunk = settings.chunk
        self.words = context.words()
        self.desk = Desk(context)
        self.seen: Counter[str] = Counter()
        own = any(member.model is None for member in settings.pool)
        self._vlm = context.need_vlm(self.name) if own else None
        self._loaded: dict[tuple[str, str], Any] = {}

    def build_many(self, chunk: Sequence[Example]) -> Iterator[Preference | Skip]:
        """Answer, rate, and pair what is rated differently."""
        drawn = self._answers(chunk)
        works = [
            rate_by_rule(example, text)
            if self.context.writer is None
            else rate_by_writer(example, text, self.settings.show)
            for example, answers in zip(chunk, drawn, strict=True)
            for text in answers
        ]
        rated = iter(self.desk.together(works))
        for example, answers in zip(chunk, drawn, strict=True):
            outcomes = [next(rated) for _ in answers]
            yield from self._pair_up(example, answers, outcomes)

    def finish(self, candidates: Iterable[Preference]) -> Iterator[Preference | Skip]:
        """All pairs: each stands for itself."""
        yield from candidates

    def report(self, seen: Counter[str]) -> dict[str, Any]:
        """Answers, those that repeat another, those left out by reason, and ties."""
        return {"seen": dict(seen)}

    def _answers(self, chunk: Sequence[Example]) -> list[dict[str, int]]:
        """For each example the distinct texts, each with the first member of the pool to say it."""
        pool = range(len(self.settings.pool))
        count = min(self.settings.answers_per_prompt, len(pool))
        drawn = [
            sorted(self.context.rng(self.name, "pool", e.id).sample(pool, count)) for e in chunk
        ]
        found: list[dict[str, int]] = [{} for _ in chunk]
        for number in pool:
            asked = [place for place, members in enumerate(drawn) if number in members]
            said = self._say(number, [chunk[place] for place in asked]) if asked else []
            for place, text in zip(asked, said, strict=True):
                self.seen["answers"] += 1
                self.seen["answers_repeated"] += text in found[place]
                found[place].setdefault(text, number)
        return found

    def _say(self, number: int, examples: Sequence[Example]) -> list[str]:
        member = self.settings.pool[number]
        decoding = Decoding(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=member.temperature,
            top_p=member.top_p,
            # Two members that differ in nothing else must not draw the same text.
            seed=self.context.rng(self.name, "member", number).getrandbits(31),
        )
        drawn = generate(
            self._model(member),
            [Request(e.id, e.image, e.prompt) for e in examples],
            decoding,
            batch_size=self.settings.batch_size,
            desc=f"vlfeedback: answering ({number + 1} of {len(self.settings.pool)})",
        )
        return [self.words.tidy(samples[0]) for samples in drawn]

    def _model(self, member: Member) -> Any:
        if member.model is None:
            return self._vlm
        key = (member.model, member.image)
        if key not in self._loaded:
            from mlalign.models.loading import load_vlm_from

            self._loaded[key] = load_vlm_from(member.model, device="auto", image=member.image)
        return self._loaded[key]

    def _pair_up(
        self, example: Example, answers: dict[str, int], outcomes: Sequence[Rated | Failed]
    ) -> Iterator[Preference | Skip]:
        if len(answers) < 2:
            yield Skip(id=example.id, reason=TOO_FEW)
            return
        failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
        rated = [outcome for outcome in outcomes if isinstance(outcome, Rated)]
        self.seen.update(f"answers_left_out: {outcome.reason}" for outcome in failed)
        if len(rated) < 2:
            yield Skip(id=example.id, reason=failed[0].reason, detail=failed[0].detail)
            return
        pairs = [sorted(two, key=lambda r: -r.mean) for two in combinations(rated, 2)]
        untied = [(winner, loser) for winner, loser in pairs if winner.mean > loser.mean]
        self.seen["ties"] += len(pairs) - len(untied)
        if not untied:
            yield Skip(id=example.id, reason=ALL_TIED)
            return
        cap = self.settings.pairs_per_prompt
        if cap is not None and len(untied) > cap:
            kept = self.context.rng(self.name, "pairs", example.id).sample(range(len(untied)), cap)
            self.seen["pairs_over_the_cap"] += len(untied) - cap
            untied = [untied[place] for place in sorted(kept)]
        for number, (winner, loser) in enumerate(untied):
            yield self._pair(example, number, winner, loser, answers)

    def _pair(
        self, example: Example, number: int, winner: Rated, loser: Rated, answers: dict[str, int]
    ) -> Preference:
        sides = {"chosen": winner, "rejected": loser}
        scores = {side: rated.mean for side, rated in sides.items()}
        for side, rated in sides.items():
            for aspect, value in rated.ratings.items():
                scores[f"{side} {aspect}"] = value
        scores[CHOSEN_MENTIONS] = float(self.words.mentions(winner.text))
        scores[REJECTED_MENTIONS] = float(self.words.mentions(loser.text))
        origin = self.desk.scribe.origin()
        if self.context.writer is None:
            origin["how"] = RULE_NOTE
        pool = self.settings.pool
        return Preference(
            id=f"{self.name}-{example.id}-{number}",
            image=example.image,
            image_sha256=example.image_sha256,
            prompt=example.prompt,
            chosen=winner.text,
            rejected=loser.text,
            segments=differing_spans(winner.text, loser.text, "edit"),
            claims=tuple(
                claim
                for side, rated in sides.items()
                for claim in claims(side, rated.statements, rated.answers)
            ),
            scores=scores,
            facts=example.facts,
            origin={
                "source": example.source,
                "example": example.id,
                "builder": self.name,
                **origin,
                "seed": self.context.seed,
                "members": [
                    pool[answers[rated.text]].model_dump(exclude_none=True)
                    for rated in (winner, loser)
                ],
                "rationales": {side: dict(rated.rationales) for side, rated in sides.items()},
            },
        )


METHOD = VlFeedback
