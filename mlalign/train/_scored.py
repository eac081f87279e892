"""Answers for a reward model: tokens, the tokens at which they are scored, what they were rated.

Two forms. "answer": one score, at the last token (LLaVA-RLHF, 2309.14525). "sentence": one at the
last token of every sentence, as the ratings of ViGoR (2402.06118) are; an answer's score is then
the sum over its sentences.

The facts of an image go into the prompt where ``facts`` says so (the factually augmented form of
LLaVA-RLHF): its captions in an order drawn for each record, and its gold answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mlalign.branching.batch import PrefixBatch
from mlalign.data.pictures import Pictures
from mlalign.images import image_size
from mlalign.models._vlm import VLM
from mlalign.objects import sentences
from mlalign.records import Facts, ImageRef, Preference, RecordError, Skip

RATED = "sentence"
"""Label of a segment that is a sentence with its rating as weight: 1 right, 0 wrong."""
TOO_LONG = "no completion token left after max_length"

Form = Literal["answer", "sentence"]


class Asking(BaseModel):
    """What a reward model is shown, and where it scores."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    form: Form = "answer"
    """answer: one score at the last token; sentence: one at the end of each sentence."""
    facts: bool = False
    """Write what is known of the image behind the prompt."""
    template: str = "{prompt}\nWhat is known of the image: {facts}"
    """The prompt with facts."""

    def prompt(self, prompt: str, facts: Facts, name: str) -> str:
        """The prompt as the model gets it. Raises RecordError where facts are asked for and none
        are known."""
        if not self.facts:
            return prompt
        known = list(facts.captions)
        random.Random(name).shuffle(known)
        known += [facts.answer] if facts.answer else []
        if not known:
            problem = "no captions and no answer, but the reward model is shown facts"
            raise RecordError(
                name, "facts", problem, "Set facts: false, or give a source with them"
            )
        return self.template.format(prompt=prompt, facts=" ".join(known))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Characters [start, end) of what gets one score each."""
        return sentences(text) if self.form == "sentence" else [(0, len(text))]


@dataclass(frozen=True, kw_only=True)
class ScoredRow:
    """One image prefix, its answers, and where each is scored."""

    id: str
    image: ImageRef
    image_sha256: str
    prefix: list[int]
    completions: list[list[int]]
    places: list[list[int]]
    """For each answer the numbers of the completion tokens that get a score."""
    labels: list[list[float]] | None = None
    """1 right, 0 wrong, NaN not rated; as ``places``."""


@dataclass(frozen=True, kw_only=True)
class ScoreBatch:
    """Rows with the positions to score; M runs over scores, answer by answer."""

    rows: PrefixBatch
    row_M: Tensor
    position_M: Tensor
    completion_M: Tensor
    """Which answer of the batch a score belongs to."""
    label_M: Tensor

    def to(self, device: torch.device) -> ScoreBatch:
        """The same on a device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("rows", "row_M", "position_M", "completion_M", "label_M")
        }
        return ScoreBatch(**moved)

    def sums_C(self, score_M: Tensor) -> Tensor:
        """(C,): each answer's score, the sum over its parts."""
        return score_M.new_zeros(len(self.rows.row_C)).index_add(0, self.completion_M, score_M)


def pair_rows(
    vlm: VLM, pairs: Sequence[Preference], asking: Asking, max_length: int | None
) -> tuple[list[ScoredRow], list[Skip]]:
    """A row for each pair, chosen first. A pair of which an answer would be cut is a Skip: its
    score stands at its end.

    In the sentence form labels are the weights of segments that are RATED sentences. In a pair that
    has none, a sentence is wrong (0) where a segment of a rejected answer touches it, and right (1)
    else; pairs without segments have no labels.
    """
    rows, skips = [], []
    limit = min(max_length or vlm.max_positions, vlm.max_positions)
    for pair in pairs:
        texts = [pair.chosen, pair.rejected]
        prompt = asking.prompt(pair.prompt, pair.facts, pair.id)
        row = row_of(vlm, pair.id, pair.image, pair.image_sha256, prompt, texts, asking)
        longest = len(row.prefix) + max(map(len, row.completions))
        if longest > limit:
            detail = f"record {pair.id!r}: {longest} tokens of {limit}. Raise train.max_length"
            skips.append(Skip(id=pair.id, reason=TOO_LONG, detail=detail))
            continue
        labels = _labels(pair, asking) if asking.form == "sentence" and pair.segments else None
        rows.append(ScoredRow(**{**vars(row), "labels": labels}))
    return rows, skips


def row_of(
    vlm: VLM,
    name: str,
    image: ImageRef,
    sha256: str,
    prompt: str,
    texts: Sequence[str],
    asking: Asking,
) -> ScoredRow:
    """The row of several answers to one prompt."""
    size = image_size(image, name)
    prefix, completions = vlm.branch_ids(prompt, texts, size, name)
    places = []
    for text, ids in zip(texts, completions, strict=True):
        if asking.form == "answer":
            places.append([len(ids) - 1])
            continue
        found = vlm.token_spans(prompt, text, size, name)[-len(ids) :]
        places.append([_last(found, span, name) for span in asking.spans(text)])
    return ScoredRow(
        id=name,
        image=image,
        image_sha256=sha256,
        prefix=prefix,
        completions=completions,
        places=places,
    )


class ScoreCollator:
    """``datasets`` rows with ``index`` to ``{"batch": ScoreBatch}``."""

    def __init__(self, vlm: VLM, rows: Sequence[ScoredRow]) -> None:
        self.vlm = vlm
        self.rows = rows
        self._pictures = Pictures(vlm)

    def __call__(self, picked: Sequence[dict]) -> dict[str, ScoreBatch]:
        return {"batch": self.collate([self.rows[row["index"]] for row in picked])}

    def collate(self, rows: Sequence[ScoredRow]) -> ScoreBatch:
        """The rows as one batch."""
        batch = self.vlm.rows(
            [row.prefix for row in rows],
            [row.completions for row in rows],
            [self._pictures(row.image, row.id, row.image_sha256) for row in rows],
            ids=[[row.id] * len(row.completions) for row in rows],
        )
        places = [each for row in rows for each in row.places]
        rated = [
            each
            for row in rows
            for each in (row.labels or [[float("nan")] * len(p) for p in row.places])
        ]
        of = [c for c, each in enumerate(places) for _ in each]
        at = [_position(batch, c, place) for c, each in enumerate(places) for place in each]
        completion_M = torch.tensor(of)
        return ScoreBatch(
            rows=batch,
            row_M=batch.row_C[completion_M],
            position_M=torch.tensor(at),
            completion_M=completion_M,
            label_M=torch.tensor([value for each in rated for value in each]),
        )


def _position(batch: PrefixBatch, completion: int, place: int) -> int:
    """Where token ``place`` of a completion stands in its row: it produces the one after it."""
    length = int(batch.mask_CS[completion].sum())
    if place == length - 1:
        return int(batch.last_C[completion])
    return int(batch.source_CS[completion, place + 1])


def _last(spans: Sequence[tuple[int, int]], wanted: tuple[int, int], name: str) -> int:
    """The last token that spells a character of ``wanted``."""
    touching = [i for i, (start, end) in enumerate(spans) if start < wanted[1] and wanted[0] < end]
    if not touching:
        problem = f"no token spells characters {wanted[0]}:{wanted[1]}"
        raise RecordError(name, "text", problem, "Give text that the tokenizer can spell")
    return touching[-1]


def _labels(pair: Preference, asking: Asking) -> list[list[float]]:
    found = []
    rated = {(s.side, s.start, s.end): s.weight for s in pair.segments if s.label == RATED}
    if rated:
        sides = (("chosen", pair.chosen), ("rejected", pair.rejected))
        return [
            [rated.get((side, *span), float("nan")) for span in asking.spans(text)]
            for side, text in sides
        ]
    for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        wrong = [s for s in pair.segments if s.side == side and side == "rejected"]
        found.append(
            [
                0.0 if any(s.start < end and start < s.end for s in wrong) else 1.0
                for start, end in asking.spans(text)
            ]
        )
    return found
