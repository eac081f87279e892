"""CHAIR against a count by hand and an independent brute force."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mlalign.benchmarks.chair import METHOD as Chair
from mlalign.microworld import language, scenes, world
from mlalign.objects import vocabulary
from mlalign.records import Example, Facts, ImageRef, ObjectFact

MICRO = vocabulary("microworld")


def chair(**settings: object) -> Chair:
    return Chair(Chair.Settings(**settings))  # type: ignore[arg-type]


def example(name: str, present: list[str], captions: tuple[str, ...] = ()) -> Example:
    facts = Facts(
        objects=tuple(ObjectFact(name=n) for n in present), captions=captions, exhaustive=True
    )
    return Example(
        id=name, image=ImageRef(path=f"{name}.png"), image_sha256="", prompt="Describe.",
        facts=facts, source="test",
    )  # fmt: skip


def values(
    examples: list[Example], answers: list[str], name: str = "microworld"
) -> dict[str, float]:
    words = vocabulary(name)
    benchmark = chair()
    rows = benchmark.score(benchmark.items(examples, words, 0), answers, words)
    return {key: metric.value() for key, metric in benchmark.metrics(rows).items()}


def test_by_hand() -> None:
    examples = [example("a", ["pot", "dog"]), example("b", ["car"]), example("c", ["fish"])]
    answers = ["A red pot, a pot and a kettle and a ball, a flag.", "A car.", ""]
    found = values(examples, answers)
    assert found["halluc/chair_s"] == pytest.approx(1 / 3)
    assert found["halluc/chair_i"] == pytest.approx(3 / 6)  # kettle, ball, flag of 6 mentions
    assert found["halluc/recall"] == pytest.approx(2 / 4)  # pot and car of pot, dog, car, fish
    assert found["halluc/length"] == pytest.approx((13 + 2 + 0) / 3)
    assert found["halluc/mentions"] == pytest.approx(2)
    assert found["halluc/empty_rate"] == pytest.approx(1 / 3)
    assert found["halluc/typical_share"] == pytest.approx(2 / 3)  # pot: kettle, dog: ball


def test_brute_force_on_the_microworld() -> None:
    rng = random.Random(4)
    examples, answers = [], []
    false_mentions = mentions = covered = there = bad = words = 0
    for index in range(60):
        scene = scenes.make_scene("heldout", index)
        told = language.sft_mentions(scene, rng)
        told += [rng.choice(told)] if index % 3 == 0 else []
        answers.append(language.caption(scene.kind, told, index % language.N_STYLES))
        examples.append(world.example("heldout", index))
        said = [m.name for m in told]
        truth = {placed.name for placed in scene.objects}
        wrong = sum(name not in truth for name in said)
        false_mentions, mentions, bad = (
            false_mentions + wrong,
            mentions + len(said),
            bad + (wrong > 0),
        )
        covered, there = covered + len(truth.intersection(said)), there + len(truth)
        words += len(answers[-1].split(" "))
    found = values(examples, answers)
    assert false_mentions > 5
    assert found["halluc/chair_s"] == pytest.approx(bad / 60)
    assert found["halluc/chair_i"] == pytest.approx(false_mentions / mentions)
    assert found["halluc/recall"] == pytest.approx(covered / there)
    assert found["halluc/length"] == pytest.approx(words / 60)
    assert found["halluc/typical_share"] == 1.0  # the prior claims companions only


def test_nothing_said_at_all() -> None:
    found = values([example("a", ["pot"])], [""])
    assert found["halluc/chair_i"] == found["halluc/chair_s"] == found["halluc/recall"] == 0
    assert found["halluc/empty_rate"] == 1
    assert found["halluc/typical_share"] != found["halluc/typical_share"], "undefined: NaN"


def test_captions_add_to_the_truth() -> None:
    answers = ["A dog, a couch, a chair"]
    told = example("a", ["chair"], ("A puppy on a sofa.",))
    found = values([told], answers, "coco")
    assert found["halluc/chair_i"] == 0 and found["halluc/recall"] == 1
    found = values([example("a", ["chair"])], answers, "coco")
    assert found["halluc/chair_i"] == pytest.approx(2 / 3)


def test_prompt_override_and_words_outside_the_vocabulary() -> None:
    (item,) = chair(prompt="What is this?").items([example("a", ["pot", "tiger"])], MICRO, 0)
    assert item.prompt == "What is this?"
    assert item.gold == ["pot"] and item.meta["outside_vocabulary"] == ["tiger"]
    with pytest.raises(ValueError, match=r"data\.vocabulary"):
        chair().items([example("a", ["tiger"])], MICRO, 0)


def test_hallucinated_spans_point_at_the_words() -> None:
    answer = "A pot, then a kettle."
    benchmark = chair()
    (row,) = benchmark.score(benchmark.items([example("a", ["pot"])], MICRO, 0), [answer], MICRO)
    assert [answer[a:b] for a, b in row["hallucinated_spans"]] == ["kettle"]


def test_coco_boxes_and_captions_are_read(shared_data: Path) -> None:
    """Every class that COCO's annotations name is one of the vocabulary's."""
    raw = json.loads((shared_data / "coco128" / "instances.json").read_text())
    assert {c["name"] for c in raw["categories"]} == set(vocabulary("coco").names)
