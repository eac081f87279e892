"""RLHF-V's preferences: the model's own answer against the same with only its wrong parts mended.

Yu et al., 2312.00849, section 3.1: people rewrite the hallucinated segments of an answer and leave
the rest as it is; the corrected answer is chosen, the original rejected, and the changed segments
are what DDPO weighs. There people find and mend. Here the run's writer does against the facts of
the image; without one a judge of facts finds and rules mend (``origin.how``).

    chosen = answer, its wrong statements made true        rejected = answer
    segments = edits.edit_segments(chosen, rejected)       the rule of the edit finder stands there

An answer without hallucination makes no pair. A correction that rewrites more than ``max_changed``
of the answer is left out: it would prefer a style. Not here: pairs in one style (ha_dpo), and the
types of error that people named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data_builders._context import BuildContext
from data_builders._correcting import EXPECTED, Corrected, Desk, correct
from data_builders._judging import claims
from data_builders._pairs import CHOSEN_MENTIONS, REJECTED_MENTIONS
from data_builders.edits import edit_blocks, edit_segments, words
from mlalign.generate import Decoding, Request, generate
from mlalign.records import Example, Preference, Skip

REWRITTEN = "the correction rewrites more than it mends"


class Settings(BaseModel):
    """How answers are drawn and where an edit begins and ends."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    temperature: float = Field(default=0.0, ge=0)
    """0: greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer at most."""
    batch_size: int = Field(default=32, ge=1)
    """Answers per generation batch."""
    min_match: int = Field(default=3, ge=1)
    """Fewest words between two edits that count as unchanged; RLHF-V's finder has 3 tokens."""
    one_sided: bool = False
    """Segments also where words stand on one side only, inserted or left out; the released finder
    has none there."""
    max_changed: float = Field(default=0.5, gt=0, le=1)
    """Largest share of the answer's words that a correction may change."""
    chunk: int = Field(default=64, ge=1)
    """Examples per call."""


class RlhfV:
    """The builder. ``context.judge`` finds what is wrong; without one, the writer or the facts."""

    Settings = Settings
    name = "rlhf_v"
    expected = EXPECTED | {REWRITTEN}

    def __init__(self, settings: Settings, context: BuildContext) -> None:
        self.settings = settings
        self.context = context
        self.chunk = settings.chunk
        self.words = context.words()
        self.vlm = context.need_vlm(self.name)
        self.desk = Desk(context)
        self.seen: Counter[str] = Counter()

    def build_many(self, chunk: Sequence[Example]) -> Iterator[Preference | Skip]:
        """Answer, find what is wrong, mend it, and mark where."""
        if not chunk:
            return
        decoding = Decoding(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            seed=self.context.seed,
        )
        requests = [Request(e.id, e.image, e.prompt) for e in chunk]
        drawn = generate(
            self.vlm,
            requests,
            decoding,
            batch_size=self.settings.batch_size,
            desc="rlhf_v: answering",
        )
        texts = [self.words.tidy(samples[0]) for samples in drawn]
        works = [correct(e, text, self.seen) for e, text in zip(chunk, texts, strict=True)]
        for example, outcome in zip(chunk, self.desk.together(works), strict=True):
            if isinstance(outcome, Corrected):
                yield self._pair(example, outcome)
            else:
                yield outcome.skip

    def finish(self, candidates: Iterable[Preference]) -> Iterator[Preference | Skip]:
        """All pairs: each stands for itself."""
        yield from candidates

    def report(self, seen: Counter[str]) -> dict[str, Any]:
        """Statements by verdict, words and edits of the answers, pairs that have no segment."""
        pairs = seen["pairs"]
        return {
            "segments_per_answer": round(seen["segments"] / pairs, 2) if pairs else None,
            "words_per_answer": round(seen["words"] / pairs, 1) if pairs else None,
            "seen": dict(seen),
        }

    def _pair(self, example: Example, outcome: Corrected) -> Preference | Skip:
        chosen, rejected = outcome.corrected, outcome.text
        ours, theirs = words(chosen), words(rejected)
        blocks = edit_blocks(ours, theirs, min_match=1)
        changed = sum(max(b.chosen[1] - b.chosen[0], b.rejected[1] - b.rejected[0]) for b in blocks)
        if changed > self.settings.max_changed * len(theirs):
            detail = f"{changed} of {len(theirs)} words: {rejected} -> {chosen}"
            return Skip(id=example.id, reason=REWRITTEN, detail=detail)
        segments = edit_segments(
            chosen,
            rejected,
            min_match=self.settings.min_match,
            one_sided=self.settings.one_sided,
        )
        self.seen["pairs"] += 1
        self.seen["words"] += len(theirs)
        self.seen["segments"] += sum(s.side == "rejected" for s in segments)
        self.seen["pairs_without_segments"] += not segments
        return Preference(
            id=f"{self.name}-{example.id}-0",
            image=example.image,
            image_sha256=example.image_sha256,
            prompt=example.prompt,
            chosen=chosen,
            rejected=rejected,
            segments=segments,
            claims=tuple(claims("rejected", outcome.statements, outcome.answers)),
            scores={
                CHOSEN_MENTIONS: float(self.words.mentions(chosen)),
                REJECTED_MENTIONS: float(self.words.mentions(rejected)),
            },
            facts=example.facts,
            origin={
                "source": example.source,
                "example": example.id,
                "builder": self.name,
                **self.desk.scribe.origin(),
                "seed": self.context.seed,
                "words_changed": changed,
            },
        )


METHOD = RlhfV
