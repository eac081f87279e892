"""RLAIF-V's preferences: samples of one model, scored by the claims that a judge rejects.

Yu et al., 2405.17220, section 3. Deconfounded sampling: one model, one prompt, one decoding
setting, different seeds. Divide: each answer is split into claims, each claim turned into a yes/no
question. Conquer: the judge answers each by the probabilities of yes and no. Combine:

    score(answer) = -(number of claims with p_no > p_yes)        a sum over claims, not a mean

Pairs have a score gap of at least ``min_gap``, at most ``pairs_per_prompt`` of a prompt; then those
with (length_rejected - length_chosen) / length_rejected above a ratio are dropped, the ratio chosen
from 0, 0.02 ... 1 so that the mean length gap is smallest (lengths in words). There Llama-3-8B
splits and asks. Here the run's writer does, without one rules (``origin.how``). The judge is the
model itself, unless the run names one; planted facts only measure how often it is right.

An answer without a claim would score 0, the best there is: it is left out and counted, as is one
that the writer did not split. Not here: the iterations of the paper (build, train, build again).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data_builders._balance import best_ratio, keeps
from data_builders._context import BuildContext
from data_builders._jobs import Failed, Split
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

_JUDGED = "judge_"
"""Opens the keys of ``seen`` that hold the numbers of an Agreement."""


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
        self.scribe = context.scribe()
        self.vlm = context.need_vlm(self.name)
        self.judge = context.judge if context.judge is not None else own_judge(context, self.name)
        self.truth = facts_judge(context)
        self.seen: Counter[str] = Counter()
        self._ratio: float | None = None

    def build_many(self, chunk: Sequence[Example]) -> Iterator[Preference | Skip]:
        """Sample, split, judge and pair."""
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
        stated, failed = self._split(chunk, texts)
        asked = [[s.question for found in each.values() for s in found] for each in stated]
        answers = ask_all(self.judge, chunk, asked)
        truths = ask_all(self.truth, chunk, asked)
        agreement = Agreement()
        for number, example in enumerate(chunk):
            for question, answer in answers[number].items():
                agreement.add(answer, truths[number][question])
            scored = self._score(texts[number], stated[number], answers[number])
            if len(scored) < 2 and failed[number]:
                yield Skip(id=example.id, reason=failed[number][0].reason)
                continue
            yield from self._pair_up(example, scored, answers[number])
        self.seen.update({_JUDGED + key: count for key, count in vars(agreement).items()})

    def finish(self, candidates: Iterable[Preference]) -> Iterator[Preference | Skip]:
        """All pairs but those that length balance and the cap on unequal counts leave out."""
        self._ratio = None
        if self.settings.balance_lengths:
            self._ratio = best_ratio(map(_lengths, candidates))
        balanced = (pair for pair in candidates if self._balanced(pair))
        cap = EqualCounts(self.settings.equal_counts, balanced)
        for pair in candidates:
            if self._balanced(pair):
                yield cap.admit(pair)
            else:
                chosen, rejected = _lengths(pair)
                yield Skip(id=pair.id, reason=TOO_LONG, detail=f"{chosen} against {rejected} words")

    def report(self, seen: Counter[str]) -> dict[str, Any]:
        """How often the judge is right, by planted facts; answers left out; the ratio found."""
        judged = {f.name: seen[_JUDGED + f.name] for f in fields(Agreement)}
        return {
            "judge": type(self.judge).__name__,
            "judge_against_facts": Agreement(**judged).report(),
            "length_ratio": self._ratio,
            "seen": {key: n for key, n in seen.items() if not key.startswith(_JUDGED)},
        }

    def _balanced(self, pair: Preference) -> bool:
        return self._ratio is None or keeps(*_lengths(pair), self._ratio)

    def _split(
        self, chunk: Sequence[Example], texts: Sequence[Sequence[str]]
    ) -> tuple[list[dict[str, list[Statement]]], list[list[Failed]]]:
        """Statements by distinct answer, and what could not be split, for each example."""
        jobs = [
            Split(example=example, text=text)
            for example, samples in zip(chunk, texts, strict=True)
            for text in dict.fromkeys(samples)
        ]
        done = iter(self.scribe.do(jobs))
        stated: list[dict[str, list[Statement]]] = []
        failed: list[list[Failed]] = []
        for samples in texts:
            stated.append({})
            failed.append([])
            for text in dict.fromkeys(samples):
                found = next(done)
                if isinstance(found, Failed):
                    failed[-1].append(found)
                    self.seen[f"answers_left_out: {found.reason}"] += samples.count(text)
                else:
                    stated[-1][text] = found
        return stated, failed

    def _score(
        self, texts: list[str], stated: dict[str, list[Statement]], answers: dict[str, Answer]
    ) -> list[_Scored]:
        """The distinct answers that make at least one claim that the judge decides."""
        self.seen["answers"] += len(texts)
        scored = []
        for text, statements in stated.items():
            decided = [s for s in statements if answers[s.question].decided]
            self.seen["claims"] += len(decided)
            if not decided:
                self.seen["answers_without_claims"] += texts.count(text)
                continue
            rejected = sum(answers[s.question].verdict is False for s in decided)
            self.seen["claims_rejected"] += rejected
            scored.append(
                _Scored(text, texts.index(text), decided, -rejected, self.words.mentions(text))
            )
        return scored

    def _pair_up(
        self, example: Example, scored: list[_Scored], answers: dict[str, Answer]
    ) -> Iterator[Preference | Skip]:
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
            yield self._pair(example, made, winner, loser, answers)
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
                **self.scribe.origin(),
                "seed": self.context.seed,
                "samples": [winner.sample, loser.sample],
                "judge": type(self.judge).__name__,
            },
        )


def _lengths(pair: Preference) -> tuple[int, int]:
    """Words of the chosen and of the rejected answer."""
    return len(pair.chosen.split()), len(pair.rejected.split())


METHOD = RlaifV
