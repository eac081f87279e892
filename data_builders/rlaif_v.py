"""RLAIF-V's preferences: samples of one model, scored by the claims that a judge rejects.

Yu et al., 2405.17220, section 3. Deconfounded sampling: one model, one prompt, one decoding
setting, different seeds. Divide: each answer is split into claims, each claim turned into a yes/no
question. Conquer: the judge answers each by the probabilities of yes and no. Combine:

    score(answer) = -(number of claims with p_no > p_yes)        a sum over claims, not a mean

Pairs have a score gap of at least ``min_gap``, at most ``pairs_per_prompt`` of a prompt; then those
with (length_rejected - length_chosen) / length_rejected above a ratio are dropped, the ratio chosen
from 0, 0.02 ... 1 so that the mean length gap is smallest (lengths in words). There Llama-3-8B
splits and asks; here rules do (``origin.how``). The judge is the model itself, unless the run names
one; planted facts only measure how often it is right.

An answer without a claim would score 0, the best there is: it is left out and counted. Not here:
the iterations of the paper (build, train, build again).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data_builders._balance import best_ratio, keeps
from data_builders._context import BuildContext
from data_builders._judging import Agreement, ask_all, claims, facts_judge, own_judge
from data_builders._language import Statement
from data_builders._pairs import (
    CHOSEN_MENTIONS,
    COUNTS_DIFFER,
    REJECTED_MENTIONS,
    EqualCounts,
    differing_spans,
)
from mlalign.generate import Decoding, Request, generate
from mlalign.judges import Answer
from mlalign.records import Example, Preference, Skip

NO_CLAIMS = "fewer than two different answers with claims"
NO_GAP = "no two answers differ enough in score"
TOO_LONG = "dropped for length balance"


class Settings(BaseModel):
    """How answers are drawn, scored and paired."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    samples: int = Field(default=10, ge=2)
    """Answers per prompt, all by the same decoding."""
    temperature: float = Field(default=0.7, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=96, ge=1)
    """Tokens of an answer at most."""
    batch_size: int = Field(default=64, ge=1)
    """Answers per generation batch."""
    min_gap: int = Field(default=1, ge=1)
    """Least difference of the scores of a pair."""
    pairs_per_prompt: int = Field(default=2, ge=1)
    balance_lengths: bool = True
    """Drop pairs whose rejected side is much longer, by the ratio that balances lengths best."""
    equal_counts: float = Field(default=0.9, ge=0, le=1)
    """Least share of pairs whose sides mention equally many objects."""
    chunk: int = Field(default=64, ge=1)
    """Examples per call."""


@dataclass(frozen=True)
class _Scored:
    """One distinct answer with its claims."""

    text: str
    sample: int
    """Number of the first sample that gave it."""
    statements: list[Statement]
    score: int
    mentions: int


class RlaifV:
    """The builder. ``context.judge`` answers; without one, the model judges itself."""

    Settings = Settings
    name = "rlaif_v"
    expected = frozenset({NO_CLAIMS, NO_GAP, TOO_LONG, COUNTS_DIFFER})

    def __init__(self, settings: Settings, context: BuildContext) -> None:
        self.settings = settings
        self.context = context
        self.chunk = settings.chunk
        self.words = context.words()
        self.vlm = context.need_vlm(self.name)
        self.judge = context.judge if context.judge is not None else own_judge(context, self.name)
        self.truth = facts_judge(context)
        self._cap = EqualCounts(settings.equal_counts)
        self._pairs: list[Preference] = []
        self._agreement = Agreement()
        self._seen: Counter[str] = Counter()
        self._ratio: float | None = None

    def build_many(self, chunk: Sequence[Example]) -> Iterator[Preference | Skip]:
        """Sample, split, judge and pair. Pairs wait for ``finish``: balance needs all lengths."""
        if not chunk:
            return
        decoding = Decoding(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            samples=self.settings.samples,
            seed=self.context.seed,
        )
        requests = [Request(e.id, e.image, e.prompt) for e in chunk]
        drawn = generate(
            self.vlm,
            requests,
            decoding,
            batch_size=self.settings.batch_size,
            desc="rlaif_v: sampling",
        )
        texts = [[self.words.tidy(text) for text in samples] for samples in drawn]
        stated = [{text: self.words.statements(text) for text in samples} for samples in texts]
        asked = [[s.question for found in each.values() for s in found] for each in stated]
        answers = ask_all(self.judge, chunk, asked)
        truths = ask_all(self.truth, chunk, asked)
        for number, example in enumerate(chunk):
            for question, answer in answers[number].items():
                self._agreement.add(answer, truths[number][question])
            scored = self._score(texts[number], stated[number], answers[number])
            yield from self._pair_up(example, scored, answers[number])

    def finish(self) -> Iterator[Preference | Skip]:
        """The pairs that length balance and the cap on unequal counts leave."""
        lengths = [(len(p.chosen.split()), len(p.rejected.split())) for p in self._pairs]
        self._ratio = best_ratio(lengths) if self.settings.balance_lengths else None
        for pair, (chosen, rejected) in zip(self._pairs, lengths, strict=True):
            if self._ratio is not None and not keeps(chosen, rejected, self._ratio):
                yield Skip(id=pair.id, reason=TOO_LONG, detail=f"{chosen} against {rejected} words")
            else:
                yield from self._cap.admit(pair)
        self._pairs.clear()
        yield from self._cap.finish()

    def report(self) -> dict[str, Any]:
        """How often the judge is right, by planted facts; answers left out; the ratio found."""
        return {
            "judge": type(self.judge).__name__,
            "judge_against_facts": self._agreement.report(),
            "length_ratio": self._ratio,
            "seen": dict(self._seen),
        }

    def _score(
        self, texts: list[str], stated: dict[str, list[Statement]], answers: dict[str, Answer]
    ) -> list[_Scored]:
        """The distinct answers that make at least one claim that the judge decides."""
        self._seen["answers"] += len(texts)
        scored = []
        for text, statements in stated.items():
            decided = [s for s in statements if answers[s.question].decided]
            self._seen["claims"] += len(decided)
            if not decided:
                self._seen["answers_without_claims"] += texts.count(text)
                continue
            rejected = sum(answers[s.question].verdict is False for s in decided)
            self._seen["claims_rejected"] += rejected
            scored.append(
                _Scored(text, texts.index(text), decided, -rejected, self.words.mentions(text))
            )
        return scored

    def _pair_up(
        self, example: Example, scored: list[_Scored], answers: dict[str, Answer]
    ) -> Iterator[Skip]:
        if len(scored) < 2:
            yield Skip(id=example.id, reason=NO_CLAIMS)
            return
        rng = self.context.rng(self.name, example.id)
        options = [
            (winner, loser)
            for winner in scored
            for loser in scored
            if winner.score - loser.score >= self.settings.min_gap
        ]
        if not options:
            yield Skip(id=example.id, reason=NO_GAP)
            return
        rng.shuffle(options)
        options.sort(key=lambda pair: pair[0].mentions != pair[1].mentions)
        used: Counter[int] = Counter()
        made = 0
        while options and made < self.settings.pairs_per_prompt:
            # Other answers before the same ones again; a stable sort keeps the order otherwise.
            options.sort(
                key=lambda pair: (
                    pair[0].mentions != pair[1].mentions,
                    used[pair[0].sample] + used[pair[1].sample],
                )
            )
            winner, loser = options.pop(0)
            used.update((winner.sample, loser.sample))
            self._pairs.append(self._pair(example, made, winner, loser, answers))
            made += 1

    def _pair(
        self,
        example: Example,
        number: int,
        winner: _Scored,
        loser: _Scored,
        answers: dict[str, Answer],
    ) -> Preference:
        return Preference(
            id=f"{self.name}-{example.id}-{number}",
            image=example.image,
            image_sha256=example.image_sha256,
            prompt=example.prompt,
            chosen=winner.text,
            rejected=loser.text,
            segments=differing_spans(winner.text, loser.text, "edit"),
            claims=(
                *claims("chosen", winner.statements, answers),
                *claims("rejected", loser.statements, answers),
            ),
            scores={
                "chosen": float(winner.score),
                "rejected": float(loser.score),
                CHOSEN_MENTIONS: float(winner.mentions),
                REJECTED_MENTIONS: float(loser.mentions),
            },
            facts=example.facts,
            origin={
                "source": example.source,
                "example": example.id,
                "builder": self.name,
                "how": self.words.how,
                "seed": self.context.seed,
                "samples": [winner.sample, loser.sample],
                "judge": type(self.judge).__name__,
            },
        )


METHOD = RlaifV
