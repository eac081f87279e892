"""ViGoR's human ratings of sentences (Yan et al., 2402.06118): 15,440 texts of 7,703 images.

Read are the released ``annotations.json`` as a list, and its mirror on the Hub (MM-Hallu/ViGoR,
Parquet with the image inside): ``image_id, image, text, annotations``. The annotations, a mapping
or its JSON string, hold ``per_sentence_scores`` (sentence number -> ``Accurate`` Yes or No, with
reasons, creativity...) and ``overall_detail_score``. The prompt is not released; ``prompt`` stands
for it.

``rated`` gives every text with its scores. ``pairs`` gives, of the texts of one image, any two
whose score differs: by default the share of accurate sentences, which a longer text does not raise
by itself. ViGoR itself learns from the ratings, not from pairs: ``ratings`` makes records for that,
two texts of one image each, the rating of every sentence as a segment of weight 1 (accurate) or 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations, islice
from typing import Any, Literal

from data_builders.sources._common import faulty
from data_builders.sources._fields import as_mapping, image_of, json_of, number_of, text_of
from data_builders.sources._fields import value_of as value_in
from data_builders.sources._released import PairSource, Released, count_rows, read, rows_of
from mlalign.objects import sentences
from mlalign.records import ImageRef, Preference, Rated, RecordError, Segment, Skip, Span

TIE = "scores tie"
DIFFER = "sentences and scores differ in number"
ALONE = "the only usable text of its image"


class Settings(Released):
    """Where the release lies, and which score makes a pair."""

    images: str | None = None
    """Folder of the images (COCO train2017), looked up as ``{image_id}.jpg`` where a row holds
    none."""
    prompt: str = "Describe this image in detail."
    """The request that every text is taken to answer."""
    score: Literal["accuracy", "detail"] = "accuracy"
    """What decides a pair: the share of accurate sentences, or overall_detail_score."""
    ratings: bool = False
    """For a reward model of sentences: each text once (twice where its image has an odd number of
    them), ties too, its sentences' ratings as segments. A text whose sentences are not as many as
    its ratings is left out, counted."""


@dataclass(frozen=True, kw_only=True)
class _Scored:
    id: str
    text: str
    scores: dict[str, float]
    sentences: list[dict[str, Any]]


class Vigor(PairSource):
    """The source."""

    Settings = Settings
    name = "vigor"
    patterns = ("*.parquet", "annotations*.json", "*.jsonl", "*.json")
    expected = frozenset({TIE, ALONE, f"annotations: {DIFFER}"})

    def pairs(self, limit: int | None, seed: int) -> Iterator[Preference | Skip]:
        """Pairs and skips of the first ``limit`` texts; an image's come with the last of them.

        Reads the image ids first, so that only the texts of unfinished images are held.
        """
        ids = chain.from_iterable(rows_of(file, ["image_id"]) for file in self.files())
        left = Counter(_image_id(row.value) for row in islice(ids, limit))
        waiting: dict[str, list[_Scored]] = defaultdict(list)

        def made(row: dict[str, Any], record_id: str) -> Iterator[Preference | Skip]:
            value_in(row, "image_id", record_id)
            image_id = _image_id(row)
            left[image_id] -= 1
            try:
                text = _scored(row, record_id, self.settings.score)
                if self.settings.ratings:
                    _rated_spans(text)
                waiting[image_id].append(text)
            except RecordError as error:
                yield faulty(error)
            if not left[image_id]:
                yield from self._of_one_image(row, waiting.pop(image_id, []))

        rows = chain.from_iterable(map(rows_of, self.files()))
        yield from read(self.name, rows, self.key, made, limit, count_rows(self.files()))

    def rated(self, limit: int | None = None) -> Iterator[Rated | Skip]:
        """Every text with its scores, its sentences as segments of weight 1 (accurate) or 0.

        A text whose sentences are not as many as its scores is a skip.
        """
        rows = chain.from_iterable(map(rows_of, self.files()))
        return read(self.name, rows, self.key, self._rated, limit, count_rows(self.files()))

    def key(self, row: dict[str, Any]) -> Any:
        return row.get("image_id")

    def _of_one_image(
        self, row: dict[str, Any], texts: list[_Scored]
    ) -> Iterator[Preference | Skip]:
        if len(texts) < 2:
            for text in texts:
                yield Skip(id=text.id, reason=ALONE)
            return
        image, digest = _image(row, texts[-1].id, self.settings.images)
        by, ratings = self.settings.score, self.settings.ratings
        for first, second in _couples(texts) if ratings else combinations(texts, 2):
            if first.scores[by] == second.scores[by] and not ratings:
                yield Skip(id=first.id, reason=TIE, detail=f"{first.id} and {second.id}: {by}")
                continue
            better, worse = sorted((first, second), key=lambda text: -text.scores[by])
            try:
                yield Preference(
                    # Both ids: three texts of an image make pairs with one first text.
                    id=f"{first.id}+{second.id.removeprefix(self.name + '-')}",
                    image=image,
                    image_sha256=digest,
                    prompt=self.settings.prompt,
                    chosen=better.text,
                    rejected=worse.text,
                    segments=_segments(better, worse) if ratings else (),
                    scores={"chosen": better.scores[by], "rejected": worse.scores[by]},
                    origin=self.origin(row=row["image_id"], texts=[better.id, worse.id], score=by),
                )
            except RecordError as error:
                yield faulty(error)

    def _rated(self, row: dict[str, Any], record_id: str) -> Iterator[Rated | Skip]:
        text = _scored(row, record_id, None)
        spans = _rated_spans(text)
        image, digest = _image(row, record_id, self.settings.images)
        yield Rated(
            id=record_id,
            image=image,
            image_sha256=digest,
            prompt=self.settings.prompt,
            text=text.text,
            segments=tuple(
                Span(start=start, end=end, label="sentence", weight=weight)
                for start, end, weight in spans
            ),
            scores=text.scores,
            origin=self.origin(row=row.get("image_id"), sentences=text.sentences),
        )


def _scored(row: dict[str, Any], record_id: str, needed: str | None) -> _Scored:
    """The text and its scores; ``needed`` has to be among them. Raises RecordError."""
    said = json_of(row, "annotations", record_id)
    table = as_mapping(
        value_in(said, "per_sentence_scores", record_id), "per_sentence_scores", record_id
    )
    if not table or not all(number.isdigit() for number in table):
        problem = "is not a mapping of sentence numbers"
        raise RecordError(record_id, "per_sentence_scores", problem, "Mend or remove the row")
    sentences = [
        as_mapping(table[number], "per_sentence_scores", record_id)
        for number in sorted(table, key=int)
    ]
    marks = [_accurate(sentence, record_id) for sentence in sentences]
    scores = {"accuracy": sum(marks) / len(marks)}
    if said.get("overall_detail_score") is not None:
        key = "overall_detail_score"
        scores["detail"] = number_of(said[key], key, record_id)
    if needed == "detail" and "detail" not in scores:
        raise RecordError(record_id, "overall_detail_score", "missing", "Set score: accuracy")
    text = text_of(row, "text", record_id)
    return _Scored(id=record_id, text=text, scores=scores, sentences=sentences)


def _rated_spans(text: _Scored) -> list[tuple[int, int, float]]:
    """(start, end, 1 accurate or 0) of every sentence. Raises RecordError where they are not as
    many as the ratings: no sentence can then be told to be the one that was rated."""
    spans = sentences(text.text)
    if len(spans) != len(text.sentences):
        raise RecordError(text.id, "annotations", DIFFER, "Mend or remove the row")
    return [
        (start, end, _accurate(said, text.id))
        for (start, end), said in zip(spans, text.sentences, strict=True)
    ]


def _segments(chosen: _Scored, rejected: _Scored) -> tuple[Segment, ...]:
    sides: tuple[tuple[Literal["chosen", "rejected"], _Scored], ...]
    sides = (("chosen", chosen), ("rejected", rejected))
    return tuple(
        Segment(side=side, start=start, end=end, label="sentence", weight=weight)
        for side, text in sides
        for start, end, weight in _rated_spans(text)
    )


def _couples(texts: list[_Scored]) -> list[tuple[_Scored, _Scored]]:
    """Two after two; the last of an odd number with the one before it."""
    couples = list(zip(texts[::2], texts[1::2], strict=False))
    return couples + ([(texts[-2], texts[-1])] if len(texts) % 2 else [])


def _accurate(sentence: dict[str, Any], record_id: str) -> float:
    said = sentence.get("Accurate")
    if said not in ("Yes", "No"):
        raise RecordError(record_id, "Accurate", "neither Yes nor No", "Mend or remove the row")
    return float(said == "Yes")


def _image_id(row: Any) -> str:
    return str(row.get("image_id")) if isinstance(row, dict) else ""


def _image(row: dict[str, Any], record_id: str, images: str | None) -> tuple[ImageRef, str]:
    given = row.get("image")
    if given is None:
        given = f"{value_in(row, 'image_id', record_id)}.jpg"
    return image_of(given, record_id, images)


METHOD = Vigor
