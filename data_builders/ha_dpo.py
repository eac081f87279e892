"""HA-DPO's preferences: the model's own description against itself corrected, in one style.

Zhao et al., 2311.16839, section 3: the model describes an image by greedy search; what is wrong is
found and corrected against the facts of the image (captions, objects, region descriptions); both
sides are rephrased to one style, three times, so that only truth differs between them. The same
findings also give yes/no pairs. There GPT-4 detects, corrects and rephrases. Here the run's writer
does; without one a judge of facts detects and rules do the rest (``origin.how``).

By rule a wrong mention is replaced by a true object that the description had left out, where there
is one, else removed. So truth, not brevity, is preferred; ``equal_counts`` bounds what is left of
brevity.

Findings are about single statements, not sentences. Not here: beam search (5 beams in the paper)
and statements that the facts cannot decide, which stay as they are on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from data_builders._context import BuildContext
from data_builders._correcting import EXPECTED, Corrected, Desk, Uncorrected, correct
from data_builders._jobs import Check, Convert, Failed, Paraphrase, Work
from data_builders._judging import ask_all, claims, own_judge
from data_builders._pairs import (
    CHOSEN_MENTIONS,
    COUNTS_DIFFER,
    REJECTED_MENTIONS,
    EqualCounts,
    differing_spans,
)
from data_builders._questions import pick, presence_names
from mlalign.generate import Decoding, Request, generate
from mlalign.judges import Answer
from mlalign.records import Example, Preference, Segment, Skip

NO_WORDING = "no wording tells the corrected description from the model's"
EMPTY_WORDING = "a paraphrase is empty"

_CAPTIONS_ASKED = 4
"""Descriptions of the image or its regions that a writer turns into questions."""


class Settings(BaseModel):
    """How descriptions are drawn and what is made of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_new_tokens: int = Field(default=96, ge=1)
    """Tokens of a description at most."""
    batch_size: int = Field(default=32, ge=1)
    """Descriptions per generation batch."""
    paraphrases: int = Field(default=3, ge=0, le=4)
    """Wordings that both sides are put in, by rule the model's own first; 0: no description pairs.
    """
    wordings: Literal["all", "one"] = "all"
    """all: a pair for each wording, as the paper trains on; one: a pair for one of them, drawn for
    each image, as the released loader has it."""
    yes_no: int = Field(default=2, ge=0)
    """Yes/no pairs per image, truths of yes and of no in turn, the model's own mistakes first."""
    only_mistakes: bool = False
    """True: no yes/no pair where the model answers rightly, as the released loader skips them."""
    yes: str = "Yes."
    """The answer text for yes."""
    no: str = "No."
    """The answer text for no."""
    equal_counts: float = Field(default=0.9, ge=0, le=1)
    """Least share of description pairs whose sides mention equally many objects."""
    chunk: int = Field(default=64, ge=1)
    """Examples per call."""


class HaDpo:
    """The builder. ``context.judge`` finds what is wrong; without one, the writer or the facts."""

    Settings = Settings
    name = "ha_dpo"
    expected = EXPECTED | {COUNTS_DIFFER, NO_WORDING}

    def __init__(self, settings: Settings, context: BuildContext) -> None:
        self.settings = settings
        self.context = context
        self.chunk = settings.chunk
        self.words = context.words()
        self.vlm = context.need_vlm(self.name)
        self.desk = Desk(context)
        self.own = own_judge(context, self.name)
        self.seen: Counter[str] = Counter()

    def build_many(self, chunk: Sequence[Example]) -> Iterator[Preference | Skip]:
        """Describe, judge, correct; then ask the model what the descriptions got wrong."""
        if not chunk:
            return
        requests = [Request(e.id, e.image, e.prompt) for e in chunk]
        decoding = Decoding(max_new_tokens=self.settings.max_new_tokens)
        drawn = generate(
            self.vlm,
            requests,
            decoding,
            batch_size=self.settings.batch_size,
            desc="ha_dpo: describing",
        )
        texts = [self.words.tidy(samples[0]) for samples in drawn]
        works = [self._describe(e, text) for e, text in zip(chunk, texts, strict=True)]
        found = []
        for outcome, made in self.desk.together(works):
            found.append(outcome)
            yield from made
        yield from self._yes_no(chunk, found)

    def finish(self, candidates: Iterable[Preference]) -> Iterator[Preference | Skip]:
        """All pairs but descriptions with unequal counts that there is no room for."""
        yield from map(EqualCounts(self.settings.equal_counts, candidates).admit, candidates)

    def report(self, seen: Counter[str]) -> dict[str, Any]:
        """Statements by verdict, and yes/no pairs by truth and by what the model answered."""
        return {"seen": dict(seen)}

    def _describe(
        self, example: Example, text: str
    ) -> Work[tuple[Corrected | Uncorrected, list[Preference | Skip]]]:
        """What was found in a description, and its pairs in each wording."""
        outcome = yield from correct(example, text, self.seen)
        if isinstance(outcome, Uncorrected):
            return outcome, [outcome.skip]
        made: list[Preference | Skip] = []
        for number in self._numbers(example):
            pair = yield from self._worded(example, outcome, number)
            if pair is None:
                self.seen["paraphrases_without_difference"] += 1
            else:
                made.append(pair)
        if not made and self.settings.paraphrases:
            made.append(Skip(id=example.id, reason=NO_WORDING, detail=text))
        return outcome, made

    def _numbers(self, example: Example) -> Sequence[int]:
        every = range(self.settings.paraphrases)
        if self.settings.wordings == "all" or not every:
            return every
        return [self.context.rng(self.name, "wording", example.id).choice(every)]

    def _worded(
        self, example: Example, outcome: Corrected, number: int
    ) -> Work[Preference | Skip | None]:
        # Both sides in one wording; by rule, the one that the rejected side has at this number.
        chosen = yield Paraphrase(example=example, text=outcome.corrected, number=number)
        rejected = yield Paraphrase(example=example, text=outcome.text, number=number)
        for side in (chosen, rejected):
            if isinstance(side, Failed):
                return Skip(id=example.id, reason=side.reason, detail=side.detail)
            if side is not None and not side.strip():
                return Skip(id=example.id, reason=EMPTY_WORDING, detail=f"wording {number}")
        if chosen is None or rejected is None or chosen == rejected:
            return None
        return Preference(
            id=f"{self.name}-{example.id}-{number}",
            image=example.image,
            image_sha256=example.image_sha256,
            prompt=example.prompt,
            chosen=chosen,
            rejected=rejected,
            segments=differing_spans(chosen, rejected, "edit"),
            claims=tuple(claims("rejected", outcome.statements, outcome.answers)),
            scores={
                CHOSEN_MENTIONS: float(self.words.mentions(chosen)),
                REJECTED_MENTIONS: float(self.words.mentions(rejected)),
            },
            facts=example.facts,
            origin=self._origin(example, "description", wording=number, model_text=outcome.text),
        )

    def _yes_no(
        self, chunk: Sequence[Example], found: Sequence[Corrected | Uncorrected]
    ) -> Iterator[Preference | Skip]:
        """Questions whose truth is known, asked of the model; its mistakes first."""
        if not self.settings.yes_no:
            return
        works = [self._truths(e, outcome) for e, outcome in zip(chunk, found, strict=True)]
        truths = self.desk.together(works)
        asked = [[] if isinstance(truth, Failed) else list(truth) for truth in truths]
        answers = ask_all(self.own, chunk, asked)
        for example, truth, own in zip(chunk, truths, answers, strict=True):
            if isinstance(truth, Failed):
                yield Skip(id=example.id, reason=truth.reason, detail=truth.detail)
                continue
            picked = pick(
                truth,
                own,
                self.context.rng(self.name, "questions", example.id),
                count=self.settings.yes_no,
                only_mistakes=self.settings.only_mistakes,
            )
            for number, question in enumerate(picked):
                yield self._question_pair(example, number, question, truth[question], own[question])

    def _truths(
        self, example: Example, outcome: Corrected | Uncorrected
    ) -> Work[dict[str, Answer] | Failed]:
        """Truth by question: what the description says, what its correction says, presence of what
        it left out and of typical companions, and by a writer what is known of the image."""
        restated = outcome.restated if isinstance(outcome, Corrected) else []
        questions = [s.question for s in (*outcome.statements, *restated)]
        said = {s.object for s in outcome.statements}
        rng = self.context.rng(self.name, "absent", example.id)
        names = presence_names(example.facts, said, self.context.vocabulary, rng)
        questions += [self.words.presence_question(name) for name in names]
        if self.context.writer is not None:
            captions = list(example.facts.captions)
            self.context.rng(self.name, "captions", example.id).shuffle(captions)
            more = yield Convert(example=example, statements=captions[:_CAPTIONS_ASKED])
            if isinstance(more, Failed):
                return more
            questions += more
        questions = list(dict.fromkeys(questions))
        known = outcome.answers
        checked = yield Check(example=example, questions=[q for q in questions if q not in known])
        if isinstance(checked, Failed):
            return checked
        return {q: known[q] if q in known else checked[q] for q in questions}

    def _question_pair(
        self, example: Example, number: int, question: str, truth: Answer, own: Answer
    ) -> Preference:
        right, wrong = self.settings.yes, self.settings.no
        if not truth.verdict:
            right, wrong = wrong, right
        mistaken = own.verdict is not truth.verdict
        self.seen[f"yes_no_truth_{'yes' if truth.verdict else 'no'}"] += 1
        self.seen["yes_no_model_mistaken"] += mistaken
        return Preference(
            id=f"{self.name}-{example.id}-q{number}",
            image=example.image,
            image_sha256=example.image_sha256,
            prompt=question,
            chosen=right,
            rejected=wrong,
            segments=(
                Segment(side="chosen", start=0, end=len(right), label="answer"),
                Segment(side="rejected", start=0, end=len(wrong), label="answer"),
            ),
            scores={"model_p_yes": own.p_yes, "model_p_no": own.p_no},
            facts=example.facts,
            origin=self._origin(example, "yes_no", model_mistaken=mistaken),
        )

    def _origin(self, example: Example, part: str, **more: Any) -> dict[str, Any]:
        return {
            "source": example.source,
            "example": example.id,
            "builder": self.name,
            "part": part,
            **self.desk.scribe.origin(),
            "seed": self.context.seed,
            **more,
        }


METHOD = HaDpo
