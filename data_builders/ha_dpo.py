"""HA-DPO's preferences: the model's own description against itself corrected, in one style.

Zhao et al., 2311.16839, section 3: the model describes an image by greedy search; what is wrong is
found and corrected against the facts of the image; both sides are rephrased to one style, so that
only truth differs between them. The same findings also give yes/no pairs. There GPT-4 detects,
corrects and rephrases; here a judge of facts detects and rules do the rest (``origin.how``).

A wrong mention is replaced by a true object that the description had left out, where there is one,
else removed. So truth, not brevity, is preferred; ``equal_counts`` bounds what is left of brevity.

Not here: beam search (5 beams in the paper) and statements that the facts cannot decide, which stay
as they are on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data_builders._context import BuildContext
from data_builders._judging import ask_all, claims, facts_judge, own_judge
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
from mlalign.records import Example, Preference, Segment, Skip

NO_STATEMENT = "the description states nothing that can be checked"
NOTHING_WRONG = "nothing wrong in the description"
NOT_CORRECTABLE = "the description cannot be corrected by rule"
STILL_WRONG = "the corrected description is still wrong"


class Settings(BaseModel):
    """How descriptions are drawn and what is made of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_new_tokens: int = Field(default=96, ge=1)
    """Tokens of a description at most."""
    batch_size: int = Field(default=32, ge=1)
    """Descriptions per generation batch."""
    paraphrases: int = Field(default=3, ge=0, le=4)
    """Wordings of each corrected description, the model's own first; 0: no description pairs."""
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
    """The builder. ``context.judge`` finds what is wrong; without one, planted facts do."""

    Settings = Settings
    name = "ha_dpo"
    expected = frozenset({NOTHING_WRONG, NOT_CORRECTABLE, STILL_WRONG, COUNTS_DIFFER})

    def __init__(self, settings: Settings, context: BuildContext) -> None:
        self.settings = settings
        self.context = context
        self.chunk = settings.chunk
        self.words = context.words()
        self.vlm = context.need_vlm(self.name)
        self.judge = context.judge if context.judge is not None else facts_judge(context)
        self.own = own_judge(context, self.name)
        self._cap = EqualCounts(settings.equal_counts)
        self._seen: Counter[str] = Counter()

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
        stated = [self.words.statements(text) for text in texts]
        asked = [[s.question for s in statements] for statements in stated]
        verdicts = ask_all(self.judge, chunk, asked)
        mended: list[str | None] = []
        for example, text, statements, answers in zip(chunk, texts, stated, verdicts, strict=True):
            corrected = self._corrected(example, text, statements, answers)
            mended.append(None if isinstance(corrected, Skip) else corrected)
            if isinstance(corrected, Skip):
                yield corrected
                continue
            for pair in self._descriptions(example, text, corrected, statements, answers):
                yield from self._cap.admit(pair)
        yield from self._yes_no(chunk, stated, mended)

    def finish(self) -> Iterator[Preference | Skip]:
        """Description pairs with unequal counts that found no room."""
        yield from self._cap.finish()

    def report(self) -> dict[str, Any]:
        """Statements by verdict, and yes/no pairs by truth and by what the model answered."""
        return {"seen": dict(self._seen)}

    def _corrected(
        self, example: Example, text: str, statements: list[Statement], answers: dict[str, Answer]
    ) -> str | Skip:
        if not statements:
            return Skip(id=example.id, reason=NO_STATEMENT, detail=text)
        wrong = [s for s in statements if answers[s.question].verdict is False]
        self._seen["statements"] += len(statements)
        self._seen["statements_wrong"] += len(wrong)
        self._seen["statements_undecided"] += sum(
            not answers[s.question].decided for s in statements
        )
        if not wrong:
            return Skip(id=example.id, reason=NOTHING_WRONG, detail=text)
        corrected = self.words.corrected(text, wrong, example.facts)
        if corrected is None:
            return Skip(id=example.id, reason=NOT_CORRECTABLE, detail=text)
        left = [s.question for s in self.words.statements(corrected)]
        if any(answer.verdict is False for answer in self.judge.ask(example, left)):
            return Skip(id=example.id, reason=STILL_WRONG, detail=f"{text} -> {corrected}")
        return corrected

    def _descriptions(
        self,
        example: Example,
        text: str,
        corrected: str,
        statements: list[Statement],
        answers: dict[str, Answer],
    ) -> Iterator[Preference]:
        for number in range(self.settings.paraphrases):
            # Both sides in the wording that the rejected one has at this number.
            chosen = self.words.paraphrase(corrected, example.facts, number)
            rejected = self.words.paraphrase(text, example.facts, number)
            if chosen is None or rejected is None or chosen == rejected:
                self._seen["paraphrases_without_difference"] += 1
                continue
            yield Preference(
                id=f"{self.name}-{example.id}-{number}",
                image=example.image,
                image_sha256=example.image_sha256,
                prompt=example.prompt,
                chosen=chosen,
                rejected=rejected,
                segments=differing_spans(chosen, rejected, "edit"),
                claims=tuple(claims("rejected", statements, answers)),
                scores={
                    CHOSEN_MENTIONS: float(self.words.mentions(chosen)),
                    REJECTED_MENTIONS: float(self.words.mentions(rejected)),
                },
                facts=example.facts,
                origin=self._origin(example, "description", wording=number, model_text=text),
            )

    def _yes_no(
        self,
        chunk: Sequence[Example],
        stated: list[list[Statement]],
        mended: list[str | None],
    ) -> Iterator[Preference]:
        """Questions whose truth is known, asked of the model; its mistakes first."""
        if not self.settings.yes_no:
            return
        questions = [
            self._questions(example, statements, corrected)
            for example, statements, corrected in zip(chunk, stated, mended, strict=True)
        ]
        truths = ask_all(self.judge, chunk, questions)
        answers = ask_all(self.own, chunk, questions)
        for example, asked, truth, own in zip(chunk, questions, truths, answers, strict=True):
            for number, question in enumerate(self._picked(example, asked, truth, own)):
                yield self._question_pair(example, number, question, truth[question], own[question])

    def _questions(
        self, example: Example, statements: list[Statement], corrected: str | None
    ) -> list[str]:
        """What the description says, what its correction says, and presence of what it left out
        and of typical companions."""
        names = sorted(example.facts.names())
        said = {s.object for s in statements}
        companions = self.context.vocabulary.companions
        typical = sorted({c for n in names for c in companions.get(n, ())[:2] if c not in names})
        rng = self.context.rng(self.name, "absent", example.id)
        others = [n for n in self.context.vocabulary.names if n not in names and n not in typical]
        # Some that nothing speaks for, so that no image is without questions to deny.
        typical += rng.sample(others, min(2, len(others)))
        presence = sorted(names, key=lambda n: (n in said, n)) + typical
        found = [s.question for s in statements]
        if corrected is not None:
            found += [s.question for s in self.words.statements(corrected)]
        return list(dict.fromkeys(found + [self.words.presence_question(n) for n in presence]))

    def _picked(
        self,
        example: Example,
        asked: Sequence[str],
        truth: dict[str, Answer],
        own: dict[str, Answer],
    ) -> list[str]:
        rng = self.context.rng(self.name, "questions", example.id)
        ranked: dict[bool, list[str]] = {True: [], False: []}
        for question in asked:
            verdict = truth[question].verdict
            if verdict is None:
                continue
            mistaken = own[question].verdict is not verdict
            if mistaken or not self.settings.only_mistakes:
                ranked[verdict].append(question)
        order = [rng.random() for _ in asked]
        for verdict, questions in ranked.items():
            keys = {
                q: (own[q].verdict is verdict, order[i])
                for i, q in enumerate(asked)
                if q in questions
            }
            questions.sort(key=keys.__getitem__)
        picked = []
        turn = rng.random() < 0.5
        while len(picked) < self.settings.yes_no and ranked[turn]:
            # Truths in turn: a surplus of "no" would teach denial.
            picked.append(ranked[turn].pop(0))
            turn = not turn
        return picked

    def _question_pair(
        self, example: Example, number: int, question: str, truth: Answer, own: Answer
    ) -> Preference:
        right, wrong = self.settings.yes, self.settings.no
        if not truth.verdict:
            right, wrong = wrong, right
        mistaken = own.verdict is not truth.verdict
        self._seen[f"yes_no_truth_{'yes' if truth.verdict else 'no'}"] += 1
        self._seen["yes_no_model_mistaken"] += mistaken
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
            "how": self.words.how,
            "seed": self.context.seed,
            **more,
        }


METHOD = HaDpo
