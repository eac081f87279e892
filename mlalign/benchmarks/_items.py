"""What every benchmark is made of: items that are asked, and metrics that can be resampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mlalign.models._vlm import VLM
from mlalign.objects import Vocabulary
from mlalign.records import Example, ImageRef


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that is asked of the model."""

    id: str
    """Unique in the benchmark."""
    example_id: str
    image: ImageRef
    prompt: str
    gold: Any
    """What is true, in the benchmark's own form; plain JSON."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Further plain JSON that scoring reads."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the image's bytes."""
        return {
            "id": self.id,
            "example_id": self.example_id,
            "image": self.image.path,
            "prompt": self.prompt,
            "gold": self.gold,
            "meta": self.meta,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Item:
        """From ``to_json``, for scoring; the image can no longer be read where it had no file."""
        return Item(
            id=value["id"],
            example_id=value["example_id"],
            image=ImageRef(path=value.get("image") or "(not stored)"),
            prompt=value["prompt"],
            gold=value["gold"],
            meta=dict(value.get("meta") or {}),
        )


Row = dict[str, Any]
"""The score of one item: at least "example_id", then the benchmark's own keys; plain JSON."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A mean of ratios of sums over images: enough for rates, means, accuracy and F1.

    The value is mean over parts p of ``sum_i numerator[p, i] / sum_i denominator[p, i]``.
    """

    numerator_PI: np.ndarray
    """float64, (parts, images)."""
    denominator_PI: np.ndarray
    empty: float = 0.0
    """Value of a part whose denominator is zero; NaN where the quantity is then undefined."""

    def value(self) -> float:
        """Over all images."""
        return float(self.resampled(np.ones((1, self.numerator_PI.shape[1])))[0])

    def resampled(self, weight_BI: np.ndarray) -> np.ndarray:
        """(B,) values over draws in which image i occurs ``weight_BI[b, i]`` times."""
        numerator_BP = weight_BI @ self.numerator_PI.T
        denominator_BP = weight_BI @ self.denominator_PI.T
        defined = denominator_BP > 0
        ratio_BP = np.divide(
            numerator_BP, denominator_BP, out=np.full_like(numerator_BP, self.empty), where=defined
        )
        return ratio_BP.mean(axis=1)

    @property
    def images(self) -> int:
        """Images that enter the value."""
        return int((self.denominator_PI != 0).any(axis=0).sum())


def ratio(numerator: Sequence[float], denominator: Sequence[float], empty: float = 0.0) -> Metric:
    """A metric of one part."""
    return Metric(
        numerator_PI=np.asarray([numerator], dtype=np.float64),
        denominator_PI=np.asarray([denominator], dtype=np.float64),
        empty=empty,
    )


def mean_of(metrics: Sequence[Metric]) -> Metric:
    """The mean of several metrics over the same images."""
    return Metric(
        numerator_PI=np.concatenate([m.numerator_PI for m in metrics]),
        denominator_PI=np.concatenate([m.denominator_PI for m in metrics]),
        empty=metrics[0].empty,
    )


class Benchmark(Protocol):
    """What a benchmark file's METHOD offers, built with its ``Settings``."""

    Settings: Any

    def items(self, examples: Sequence[Example], vocabulary: Vocabulary, seed: int) -> list[Item]:
        """What is asked, the same for the same arguments."""
        ...

    def answer(self, vlm: VLM, items: Sequence[Item], batch_size: int) -> list[str]:
        """The model's raw text for each item."""
        ...

    def score(
        self, items: Sequence[Item], answers: Sequence[str], vocabulary: Vocabulary
    ) -> list[Row]:
        """One row per item."""
        ...

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """Metrics over the images, in order of first appearance in ``rows``."""
        ...


def gold_objects(example: Example, vocabulary: Vocabulary) -> tuple[list[str], list[str]]:
    """(objects of the vocabulary that the image holds, fact names outside the vocabulary).

    As CHAIR and POPE have it: annotated objects and those that the reference captions mention.
    """
    named = example.facts.names()
    present = {name for name in named if name in vocabulary.names}
    for caption in example.facts.captions:
        present |= {span.name for span in vocabulary.objects(caption)}
    outside = sorted(named - set(vocabulary.names))
    return [name for name in vocabulary.names if name in present], outside


def by_image(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows grouped by example, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["example_id"], []).append(row)
    return list(groups.values())
