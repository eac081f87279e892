"""VLFeedback, Silkie's data (Li et al., 2312.10665): MMInstruction/VLFeedback, 80,258 prompts.

Rows ``id, prompt, models, completions, img_path``; a completion is ``model, response`` and
``annotations``: Helpfulness, Visual Faithfulness and Ethical Considerations, each with a
``Rating`` of 1 to 5 as text and a ``Rationale``. Two forms are read: JSON lines, whose completions
are a list and whose image is ``{id}.jpg`` of merged_images.zip (``img_path`` is the loader's
addition), and Parquet with the image inside, where ``datasets`` has turned the completions into
one mapping of lists.

A pair is any two completions of a prompt whose mean of three ratings differs. A tie gives none,
nor does a completion with a rating that is not a number from 1 to 5; both are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from data_builders.sources._common import faulty
from data_builders.sources._fields import (
    as_mapping,
    image_of,
    number_of,
    question_of,
    text_of,
    value_of,
)
from data_builders.sources._released import PairSource, Released
from mlalign.records import ImageRef, Preference, RecordError, Skip

ASPECTS = {
    "Helpfulness": "helpfulness",
    "Visual Faithfulness": "visual_faithfulness",
    "Ethical Considerations": "ethical_considerations",
}
TIE = "ratings tie"


class Settings(Released):
    """Where the release lies."""

    images: str | None = None
    """Folder of the images (merged_images.zip, unpacked); needed where rows hold none."""


@dataclass(frozen=True, kw_only=True)
class _Rated:
    number: int
    model: str
    text: str
    mean: float
    ratings: dict[str, float]


class VlFeedback(PairSource):
    """The source."""

    Settings = Settings
    name = "vlfeedback"
    patterns = ("*.parquet", "vlfeedback*.jsonl", "*.jsonl")
    expected = frozenset({TIE})

    def key(self, row: dict[str, Any]) -> Any:
        return row.get("id")

    def made(self, row: dict[str, Any], record_id: str) -> Iterator[Preference | Skip]:
        """A pair, a tie or a fault for every two completions; a skip for an unrated one."""
        prompt = question_of(text_of(row, "prompt", record_id), "prompt", record_id)
        completions = completions_of(row, record_id)
        image, digest = image_of(_given(row, record_id), record_id, self.settings.images)
        rated = []
        for number, completion in enumerate(completions):
            try:
                rated.append(_rated(completion, number, f"{record_id}-{number}"))
            except RecordError as error:
                yield faulty(error)
        for first, second in combinations(rated, 2):
            pair_id = f"{record_id}-{first.number}-{second.number}"
            if first.mean == second.mean:
                yield Skip(id=pair_id, reason=TIE, detail=f"both have a mean of {first.mean:.4g}")
                continue
            better, worse = (first, second) if first.mean > second.mean else (second, first)
            try:
                yield self._pair(pair_id, prompt, image, digest, better, worse, row)
            except RecordError as error:
                yield faulty(error)

    def _pair(
        self,
        pair_id: str,
        prompt: str,
        image: ImageRef,
        digest: str,
        better: _Rated,
        worse: _Rated,
        row: dict[str, Any],
    ) -> Preference:
        sides = {"chosen": better, "rejected": worse}
        return Preference(
            id=pair_id,
            image=image,
            image_sha256=digest,
            prompt=prompt,
            chosen=better.text,
            rejected=worse.text,
            scores={side: rated.mean for side, rated in sides.items()}
            | {
                f"{side}_{aspect}": rating
                for side, rated in sides.items()
                for aspect, rating in rated.ratings.items()
            },
            origin=self.origin(
                row=row.get("id"),
                models={side: rated.model for side, rated in sides.items()},
                completions={side: rated.number for side, rated in sides.items()},
            ),
        )


def completions_of(row: dict[str, Any], record_id: str) -> list[dict[str, Any]]:
    """The completions as a list, whichever way round they are stored. Raises RecordError."""
    value = value_of(row, "completions", record_id)
    if isinstance(value, dict):
        lists: list[Any] = [value.get(key) for key in ("model", "response", "annotations")]
        if isinstance(lists[2], dict):
            lists[2] = _turned(lists[2], record_id)
        if not all(isinstance(items, list) for items in lists) or len(set(map(len, lists))) != 1:
            problem = "is not a mapping of lists of one length"
            raise RecordError(record_id, "completions", problem, "Mend or remove the row")
        value = [
            {"model": model, "response": response, "annotations": annotations}
            for model, response, annotations in zip(*lists, strict=True)
        ]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RecordError(
            record_id, "completions", "is not a list of completions", "Mend or remove the row"
        )
    if len(value) < 2:
        raise RecordError(record_id, "completions", "fewer than two", "Remove the row")
    return value


def _turned(annotations: dict[str, Any], record_id: str) -> list[Any]:
    """A mapping of lists, two levels deep, as a list of mappings."""
    try:
        columns = {
            aspect: [{"Rating": rating} for rating in lists["Rating"]]
            for aspect, lists in annotations.items()
        }
        return [
            dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        problem = "annotations are not lists of one length"
        raise RecordError(record_id, "completions", problem, "Mend or remove the row") from error


def _rated(completion: dict[str, Any], number: int, record_id: str) -> _Rated:
    annotations = as_mapping(
        value_of(completion, "annotations", record_id), "annotations", record_id
    )
    ratings = {}
    for aspect, name in ASPECTS.items():
        said = as_mapping(value_of(annotations, aspect, record_id), aspect, record_id)
        rating = number_of(value_of(said, "Rating", record_id), "Rating", record_id)
        if not 1 <= rating <= 5:
            raise RecordError(record_id, "Rating", "is not from 1 to 5", "Mend it or leave it out")
        ratings[name] = rating
    return _Rated(
        number=number,
        model=str(completion.get("model")),
        text=text_of(completion, "response", record_id),
        mean=sum(ratings.values()) / len(ratings),
        ratings=ratings,
    )


def _given(row: dict[str, Any], record_id: str) -> Any:
    """The image inside the row, or the name of its file."""
    for key in ("image", "images"):
        if row.get(key) is not None:
            return row[key]
    if row.get("img_path") is not None:
        return row["img_path"]
    return f"{value_of(row, 'id', record_id)}.jpg"


METHOD = VlFeedback
