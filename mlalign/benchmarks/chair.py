"""CHAIR: how many of the objects that a caption mentions are not in the image.

Rohrbach et al., "Object Hallucination in Image Captioning" (EMNLP 2018). Over the images:
CHAIR_i = hallucinated mentions / mentions, repeats counted; CHAIR_s = captions with at least one /
captions; recall = different true objects mentioned / true objects; length = words per caption;
mentions = object mentions per caption; typical_share = hallucinated mentions that are companions
(``Vocabulary.companions``) of an object that is there / hallucinated mentions. An empty caption
is a caption. Ratios are of sums over images.

What it is not: a proof of absence where the facts come from captions. An object that none of the
reference captions mentions may still be in the photograph, and counts as hallucinated. A shorter
caption has a lower rate: read it beside recall and length. ``max_new_tokens`` is the strongest knob
of published figures (LLaVA-1.5-7B: CHAIR_s near 20 at 64 tokens, near 50 at 512).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from mlalign.benchmarks._items import Item, Metric, Row, by_image, gold_objects, ratio
from mlalign.generate import Decoding, Request, generate
from mlalign.models._vlm import VLM
from mlalign.objects import Vocabulary
from mlalign.records import Example


class Settings(BaseModel):
    """Settings of CHAIR."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    prompt: str | None = None
    """What is asked of every image; None: each example's own prompt."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens of a caption at most, decoded greedily; a caption is not cut to whole sentences."""


class Chair:
    """The benchmark."""

    Settings = Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def items(self, examples: Sequence[Example], vocabulary: Vocabulary, seed: int) -> list[Item]:
        """One per example. Raises ValueError where no example has an object of the vocabulary."""
        items = []
        for example in examples:
            gold, outside = gold_objects(example, vocabulary)
            items.append(
                Item(
                    id=example.id,
                    example_id=example.id,
                    image=example.image,
                    prompt=self.settings.prompt or example.prompt,
                    gold=gold,
                    meta={"outside_vocabulary": outside, "exhaustive": example.facts.exhaustive},
                )
            )
        if not any(item.gold for item in items):
            raise ValueError(
                f"chair: no example has an object of the vocabulary {vocabulary.name}. "
                "Set data.vocabulary to the one that the source's facts are written in"
            )
        return items

    def answer(self, vlm: VLM, items: Sequence[Item], batch_size: int) -> list[str]:
        """A greedy caption of each image."""
        requests = [Request(item.id, item.image, item.prompt) for item in items]
        decoding = Decoding(max_new_tokens=self.settings.max_new_tokens)
        told = generate(vlm, requests, decoding, batch_size=batch_size, desc="captions")
        return [texts[0] for texts in told]

    def score(
        self, items: Sequence[Item], answers: Sequence[str], vocabulary: Vocabulary
    ) -> list[Row]:
        """Mentions, the hallucinated among them with their spans, and how typical they are."""
        rows = []
        for item, answer in zip(items, answers, strict=True):
            spans = vocabulary.objects(answer)
            gold = set(item.gold)
            expected = {near for name in gold for near in vocabulary.companions.get(name, ())}
            false = [span for span in spans if span.name not in gold]
            rows.append(
                {
                    "id": item.id,
                    "example_id": item.example_id,
                    "gold": list(item.gold),
                    "mentions": [span.name for span in spans],
                    "hallucinated": [span.name for span in false],
                    "hallucinated_spans": [[span.start, span.end] for span in false],
                    "typical": [span.name in expected for span in false]
                    if vocabulary.companions
                    else None,
                    "words": len(answer.split()),
                }
            )
        return rows

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """``halluc/*``. CHAIR_i of captions without any mention is 0; recall without any true
        object, and typical_share without any hallucination, are undefined."""
        images = by_image(rows)
        captions = [float(len(group)) for group in images]

        def total(count: object) -> list[float]:
            return [float(sum(count(row) for row in group)) for group in images]  # type: ignore[operator]

        mentions = total(lambda row: len(row["mentions"]))
        false = total(lambda row: len(row["hallucinated"]))
        covered = total(lambda row: len(set(row["mentions"]) & set(row["gold"])))
        metrics = {
            "halluc/chair_s": ratio(total(lambda row: bool(row["hallucinated"])), captions),
            "halluc/chair_i": ratio(false, mentions),
            "halluc/recall": ratio(covered, total(lambda row: len(row["gold"])), float("nan")),
            "halluc/length": ratio(total(lambda row: row["words"]), captions),
            "halluc/mentions": ratio(mentions, captions),
            "halluc/empty_rate": ratio(total(lambda row: row["words"] == 0), captions),
        }
        if all(row["typical"] is not None for row in rows):
            typical = total(lambda row: sum(row["typical"]))
            metrics["halluc/typical_share"] = ratio(typical, false, float("nan"))
        return metrics


METHOD = Chair
