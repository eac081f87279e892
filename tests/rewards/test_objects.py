"""The object checker: facts, captions, a detector of any make, and one of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

from mlalign import methods
from mlalign.microworld import world
from mlalign.records import Example, ObjectFact, RecordError
from mlalign.rewards._detector import Detected, TransformersDetector, find_detector
from mlalign.rewards._reward import RewardContext, RewardError, checked
from tests.rewards.answers import COCO, context, example, said, words

METHOD = methods.find("mlalign.rewards", "object_checker")


class Sees:
    """A detector with a fixed view."""

    names = ("dog", "cat", "bus", "television", "bench")

    def __init__(self, *seen: Detected) -> None:
        self.seen = seen
        self.looks = 0

    def __call__(self, image: Any) -> list[Detected]:
        assert image.size
        self.looks += 1
        return list(self.seen)


def reward(eyes: Any = None, **settings: Any) -> Any:
    return METHOD(METHOD.Settings(**settings), context(detector=eyes))


def seen(**facts: Any) -> Example:
    """An image that can be opened, with these facts."""
    from dataclasses import replace

    made = world.example("pairs", 0)
    return replace(made, facts=example(**facts).facts)


def test_what_neither_objects_nor_captions_name_is_false():
    there = example(objects=(ObjectFact(name="dog"),), captions=("A man on a bench.",))
    answer = said("A dog, a man and a bus; the bus is red.", there)
    (out,) = checked("object_checker", reward(), [answer])
    assert words(answer, out.spans) == [("dog", 0), ("man", 0), ("bus", -1), ("bus", -1)]
    assert (out.total, out.counts) == (-2, {"mentions": 4, "false": 2, "undecided": 0})
    (out,) = reward(captions=False, right=0.5)([answer])
    assert [s.score for s in out.spans] == [0.5, -1, -1, -1]


def test_an_answer_that_says_nothing():
    (out,) = checked("object_checker", reward(), [said("")])
    assert (out.total, out.spans) == (0, ())


def test_a_detector_decides_by_its_best_score():
    eyes = Sees(
        Detected("dog", 0.3), Detected("dog", 0.9), Detected("cat", 0.3), Detected("bus", 0.1)
    )
    answer = said("a dog, a cat, a bus, a bench and a person", seen(objects=()))
    (out,) = checked("object_checker", reward(eyes, against="detector", undecided=-0.25), [answer])
    assert [s for _, s in words(answer, out.spans)] == [0, -0.25, -1, -1, -0.25]
    assert out.counts == {"mentions": 5, "false": 2, "undecided": 2}


def test_the_borders_of_present_and_absent_belong_to_them():
    for score, verdict in ((0.6, True), (0.59, None), (0.21, None), (0.2, False), (0.0, False)):
        made = reward(Sees(Detected("dog", score)), against="detector", present=0.6, absent=0.2)
        assert made.there(seen(objects=()), "dog") is verdict
    with pytest.raises(ValidationError, match=r"absent 0\.5 must be below present 0\.5"):
        METHOD.Settings(absent=0.5, present=0.5)


def test_a_detectors_words_are_the_vocabularys():
    made = reward(Sees(Detected("television", 0.8)), against="detector")
    assert made.there(seen(objects=()), "tv") is True


def test_a_detector_that_does_not_say_what_it_knows_knows_everything():
    def blind(image: Any) -> list[Detected]:
        return []

    made = reward(blind, against="detector")
    assert made.there(seen(objects=()), "giraffe") is False


def test_both_believe_the_facts_as_far_as_they_go():
    eyes = Sees(Detected("cat", 0.9))
    partial = seen(objects=(ObjectFact(name="dog"),), captions=("A bus.",))
    made = reward(eyes, against="both")
    verdicts = [made.there(partial, name) for name in ("dog", "bus", "cat", "bench", "person")]
    assert verdicts == [True, True, True, False, None]
    whole = seen(objects=(ObjectFact(name="dog"),), exhaustive=True)
    assert made.there(whole, "cat") is False


def test_an_image_is_looked_at_once():
    eyes = Sees()
    made = reward(eyes, against="detector")
    for _ in range(2):
        made([said("a dog and a cat", seen(objects=()))] * 3)
    assert eyes.looks == 1


@pytest.mark.parametrize("score", [float("nan"), -0.5, 12.0])
def test_a_detector_that_gives_no_probability(score: float):
    made = reward(Sees(Detected("dog", score)), against="detector")
    with pytest.raises(
        RewardError, match=r"the detector gave 'dog' a score of .* Scores are 0 to 1"
    ):
        made([said("a dog", seen(objects=()))])


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="against detector has no detector: set its key detector"):
        reward(against="detector")
    with pytest.raises(ValueError, match=r"object_checker needs a vocabulary"):
        METHOD(METHOD.Settings(), RewardContext())
    made = reward(Sees(), against="detector")
    with pytest.raises(RecordError, match=r"cannot read e\.png"):
        made([said("a dog")])


def test_a_detector_by_the_name_of_a_callable():
    found = find_detector("tests.rewards.test_objects:Sees")
    assert isinstance(found, Sees)
    with pytest.raises(ValueError, match="is no callable"):
        find_detector("tests.rewards.test_objects:COCO")
    assert COCO is not None


@pytest.fixture(scope="module")
def yolos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector of two classes that finds the first one everywhere."""
    folder = tmp_path_factory.mktemp("yolos")
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 64],
        patch_size=16,
        num_detection_tokens=3,
        id2label={0: "dog", 1: "sports ball", 2: "N/A"},
        label2id={"dog": 0, "sports ball": 1, "N/A": 2},
    )
    model = YolosForObjectDetection(config)
    with torch.no_grad():
        last = model.class_labels_classifier.layers[-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    model.save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder


def test_a_detector_of_transformers(yolos: Path):
    eyes = TransformersDetector(str(yolos))
    assert eyes.names == {"dog", "sports ball"}
    from mlalign.images import open_image

    picture = open_image(world.example("pairs", 0).image, "r")
    found = eyes(picture)
    assert [f.name for f in found] == ["dog"] * 3
    assert all(
        f.score > 0.99 and f.box is not None and max(f.box) <= 2 * max(picture.size) for f in found
    )
    made = reward(against="detector", detector=str(yolos))
    answer = said("a dog with a ball and a person", seen(objects=()))
    (out,) = checked("object_checker", made, [answer])
    assert words(answer, out.spans) == [("dog", 0), ("ball", -1), ("person", 0)]
    assert out.counts["undecided"] == 1
