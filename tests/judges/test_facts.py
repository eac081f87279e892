"""Planted facts answer what they can and say so where they cannot."""

import math
import random

import pytest

from mlalign.judges.facts import METHOD
from mlalign.microworld import world
from mlalign.microworld.language import claim_question, true_mentions
from mlalign.microworld.questions import questions
from mlalign.microworld.scenes import make_scene
from mlalign.objects import vocabulary
from mlalign.records import Example, Facts, ImageRef, ObjectFact


def judge(words: str):
    return METHOD(METHOD.Settings(), vocabulary=vocabulary(words))


def example(facts: Facts) -> Example:
    return Example(
        id="e",
        image=ImageRef(path="x.png"),
        image_sha256="",
        prompt="?",
        facts=facts,
        source="test",
    )


def test_agrees_with_every_truthful_question_of_the_microworld():
    facts = judge("microworld")
    decided = wrong = 0
    for index in range(200):
        scene = make_scene("pairs", index)
        pairs = [
            (q, a)
            for q, a in questions(scene, random.Random(index), 8)
            if a in ("Yes.", "No.") and not q.startswith("What")
        ]
        answers = facts.ask(world.example("pairs", index), [q for q, _ in pairs])
        for (_, truth), answer in zip(pairs, answers, strict=True):
            decided += answer.decided
            wrong += answer.decided and answer.verdict != (truth == "Yes.")
    assert wrong == 0
    assert decided > 500


def test_claims_of_true_mentions_are_yes():
    scene = make_scene("pairs", 3)
    asked = [claim_question(m) for m in true_mentions(scene)]
    answers = judge("microworld").ask(world.example("pairs", 3), asked)
    assert all(a[:2] == (1.0, 0.0) for a in answers)


CAPTIONED = example(
    Facts(objects=(ObjectFact(name="dog", attributes=("black",)), ObjectFact(name="person")))
)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Is there a dog in the image?", (1.0, 0.0)),
        ("Is there a puppy in the image?", (1.0, 0.0)),
        ("Is there a cat in the image?", (0.0, 1.0)),
        ("Is the dog black?", (1.0, 0.0)),
        ("Is the dog white?", (0.0, 1.0)),
        ("Is the cat white?", (0.0, 1.0)),
    ],
)
def test_caption_facts(question, expected):
    assert judge("coco").ask(CAPTIONED, [question])[0][:2] == expected


@pytest.mark.parametrize(
    "question", ["Is the dog small?", "Is the person white?", "Is it raining?", "Is there a tree?"]
)
def test_unknown_is_undecided_and_never_a_guess(question):
    answer = judge("coco").ask(CAPTIONED, [question])[0]
    assert math.isnan(answer.p_yes) and math.isnan(answer.p_no)
    assert not answer.decided and answer.verdict is None


def test_complete_facts_rule_out_what_is_not_listed():
    boxed = example(
        Facts(
            objects=(
                ObjectFact(
                    name="dog", box=(0, 0, 10, 10), attributes=("black",), position="top left"
                ),
                ObjectFact(name="car", box=(50, 0, 60, 10)),
            ),
            exhaustive=True,
        )
    )
    asked = ["Is the dog white?", "Is the dog left of the car?", "Is the dog above the car?",
             "Is there a dog at the top right?", "Is there a car at the top right?"]  # fmt: skip
    verdicts = [a.verdict for a in judge("coco").ask(boxed, asked)]
    assert verdicts == [False, True, False, False, None]


def test_needs_a_vocabulary():
    with pytest.raises(ValueError, match=r"data\.vocabulary"):
        METHOD(METHOD.Settings())
