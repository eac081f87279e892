"""POPE: "Is there a kettle in the image?", half of the time about what is not there.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (EMNLP 2023). Per image
up to three objects that are there, the same in every split, and as many that are not: drawn at
random, the most frequent ones over all examples (popular), or those seen most often together with
each of the asked ones (adversarial). Positive class "yes": accuracy, precision, recall and F1 per
split, and their means over the splits (the paper's headline is the mean F1). yes_rate is that of
the predictions. unparsed_rate is by the strict parser, whichever parser scores.

What it is not: proof of absence where facts come from captions, and no measure of what a model
hallucinates by itself; several aligned models lose on POPE and hallucinate less in captions.

``mode: poll`` puts all questions of an image into one row behind their common prefix and takes the
likeliest next token as the answer; ``mode: generate`` writes an answer to each question.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mlalign.benchmarks._items import Item, Metric, Row, by_image, gold_objects, mean_of, ratio
from mlalign.benchmarks._poll import poll
from mlalign.generate import Decoding, Request, generate
from mlalign.models._vlm import VLM
from mlalign.objects import Vocabulary, with_article
from mlalign.records import Example

Split = Literal["random", "popular", "adversarial"]
_WORDS = re.compile(r"[a-z']+")


class Settings(BaseModel):
    """Settings of POPE."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    splits: tuple[Split, ...] = Field(default=("random", "popular", "adversarial"), min_length=1)
    """How absent objects are chosen; each is a split with figures of its own."""
    per_image: int = Field(default=3, ge=1)
    """Present objects asked per image and split, and as many absent ones; fewer, still as many of
    both, where an image has fewer."""
    question: str = "Is there {object} in the image?"
    """{object} becomes the name with its article. LLaVA's own runs append "\\nAnswer the question
    using a single word or phrase.", which gives other figures."""
    parser: Literal["strict", "official"] = "strict"
    """strict: an answer that says neither yes nor no is unparsed, and wrong; official: POPE's rule,
    by which whatever is not a no is a yes."""
    mode: Literal["poll", "generate"] = "poll"
    max_new_tokens: int = Field(default=16, ge=1)
    """Of an answer, in mode generate."""


class Pope:
    """The benchmark."""

    Settings = Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def items(self, examples: Sequence[Example], vocabulary: Vocabulary, seed: int) -> list[Item]:
        """Questions image by image, split by split. Raises ValueError where there is none.

        An image without an object of the vocabulary has no question.
        """
        present = [gold_objects(example, vocabulary)[0] for example in examples]
        negatives = Negatives(present, vocabulary.names)
        items = []
        for example, there in zip(examples, present, strict=True):
            rng = random.Random(f"pope/{seed}/{example.id}")
            count = min(self.settings.per_image, len(there), len(vocabulary.names) - len(there))
            asked = rng.sample(there, count)
            for split in self.settings.splits:
                absent = negatives.choose(split, there, asked, rng)
                for number, (yes, no) in enumerate(zip(asked, absent, strict=True)):
                    items.append(self._item(example, split, 2 * number, yes, "yes"))
                    items.append(self._item(example, split, 2 * number + 1, no, "no"))
        if not items:
            raise ValueError(
                f"pope: no example has an object of the vocabulary {vocabulary.name}. "
                "Set data.vocabulary to the one that the source's facts are written in"
            )
        return items

    def _item(self, example: Example, split: str, number: int, name: str, gold: str) -> Item:
        return Item(
            id=f"{example.id}/{split}/{number}",
            example_id=example.id,
            image=example.image,
            prompt=self.settings.question.format(object=with_article(name)),
            gold=gold,
            meta={"split": split, "object": name},
        )

    def answer(self, vlm: VLM, items: Sequence[Item], batch_size: int) -> list[str]:
        """The model's text. A question that several splits ask of an image is asked once."""
        asked: dict[tuple[str, str], Item] = {}
        for item in items:
            asked.setdefault((item.example_id, item.prompt), item)
        if self.settings.mode == "generate":
            requests = [Request(item.id, item.image, item.prompt) for item in asked.values()]
            decoding = Decoding(max_new_tokens=self.settings.max_new_tokens)
            told = generate(vlm, requests, decoding, batch_size=batch_size, desc="answers")
            answers = [texts[0] for texts in told]
        else:
            answers = poll(vlm, list(asked.values()), batch_size)
        said = dict(zip(asked, answers, strict=True))
        return [said[item.example_id, item.prompt] for item in items]

    def score(
        self, items: Sequence[Item], answers: Sequence[str], vocabulary: Vocabulary
    ) -> list[Row]:
        """The prediction of each answer, None where it was not parsed."""
        parse = PARSERS[self.settings.parser]
        return [
            {
                "id": item.id,
                "example_id": item.example_id,
                "split": item.meta["split"],
                "object": item.meta["object"],
                "gold": item.gold,
                "prediction": parse(answer),
                "unparsed": strict(answer) is None,
            }
            for item, answer in zip(items, answers, strict=True)
        ]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """``pope/<split>/*`` and their means ``pope/*``. Precision without any yes, and F1 without
        any true or predicted yes, are 0."""
        images = by_image(rows)
        splits = list(dict.fromkeys(row["split"] for row in rows))
        parts = {
            split: _split_metrics([[r for r in group if r["split"] == split] for group in images])
            for split in splits
        }
        names = parts[splits[0]]
        metrics = {f"pope/{name}": mean_of([parts[s][name] for s in splits]) for name in names}
        for split in splits:
            metrics |= {f"pope/{split}/{name}": m for name, m in parts[split].items()}
        return metrics


def _split_metrics(images: Sequence[Sequence[Row]]) -> dict[str, Metric]:
    def count(gold: tuple[str, ...], prediction: tuple[str | None, ...]) -> list[float]:
        return [
            float(sum(r["gold"] in gold and r["prediction"] in prediction for r in group))
            for group in images
        ]

    def added(*counts: list[float]) -> list[float]:
        return [sum(each) for each in zip(*counts, strict=True)]

    both, every = ("yes", "no"), ("yes", "no", None)
    true_yes, true_no = count(("yes",), ("yes",)), count(("no",), ("no",))
    asked_yes, said_yes, asked = count(("yes",), every), count(both, ("yes",)), count(both, every)
    unparsed = [float(sum(r["unparsed"] for r in group)) for group in images]
    return {
        "accuracy": ratio(added(true_yes, true_no), asked),
        "precision": ratio(true_yes, said_yes),
        "recall": ratio(true_yes, asked_yes),
        # 2 TP / (2 TP + FP + FN): the harmonic mean of both, as one ratio of sums.
        "f1": ratio(added(true_yes, true_yes), added(said_yes, asked_yes)),
        "yes_rate": ratio(said_yes, asked),
        "unparsed_rate": ratio(unparsed, asked),
    }


class Negatives:
    """Chooses objects that are not in an image, from what is in all of them."""

    def __init__(self, present: Sequence[Sequence[str]], names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.frequency = Counter(name for there in present for name in there)
        self.together: Counter[tuple[str, str]] = Counter(
            (one, two) for there in present for one in there for two in there if one != two
        )

    def choose(
        self, split: str, there: Sequence[str], asked: Sequence[str], rng: random.Random
    ) -> list[str]:
        """One absent object for each of ``asked``, all different; ties in vocabulary order."""
        absent = [name for name in self.names if name not in set(there)]
        if split == "random":
            return rng.sample(absent, len(asked))
        absent.sort(key=lambda name: -self.frequency[name])
        if split == "popular":
            return absent[: len(asked)]
        chosen: list[str] = []
        for one in asked:
            left = [name for name in absent if name not in chosen]
            # max takes the first of equals: the more frequent, then the vocabulary's order.
            chosen.append(max(left, key=lambda name, one=one: self.together[one, name]))
        return chosen


def official(answer: str) -> str:
    """POPE's rule: "no" if the first sentence has the word No, no or not, else "yes".

    Words stand between blanks, so "", "No!", "NO" and "There is none" are all a yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def strict(answer: str) -> str | None:
    """The first word if it is yes or no, else the only one of the two that occurs, else None."""
    words = _WORDS.findall(answer.lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    said = {"yes", "no"} & set(words)
    return said.pop() if len(said) == 1 else None


PARSERS = {"strict": strict, "official": official}


METHOD = Pope
