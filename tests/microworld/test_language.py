"""Captions and their parser, questions and the prior in the training captions."""

from __future__ import annotations

import random

import pytest

from mlalign.microworld import language, scenes, world
from mlalign.microworld.language import Mention, caption, parse_caption
from mlalign.microworld.questions import questions
from mlalign.microworld.scenes import make_scene


@pytest.mark.parametrize("style", range(language.N_STYLES))
def test_caption_and_parser_are_inverse(style: int) -> None:
    for i in range(300):
        scene = make_scene("train", i)
        mentions = language.sft_mentions(scene, random.Random(i))
        text = caption(scene.kind, mentions, style)
        found, rest = parse_caption(text)
        assert [m.mention for m in found] == mentions and rest == []
        for m in found:
            assert text[slice(*m.name_span)] == m.name
            assert m.color_span and text[slice(*m.color_span)] == m.color
            assert text[slice(*m.position_span)].lower() == m.position
            assert m.span[0] <= m.position_span[0] and m.span[1] == m.name_span[1]


def test_default_style_as_written() -> None:
    mentions = [Mention("top left", "red", "pot"), Mention("middle center", "blue", "bowl")]
    text = caption("kitchen", mentions)
    assert text == "In this kitchen, top left is a red pot and middle center is a blue bowl."
    with pytest.raises(ValueError, match="style 9"):
        caption("kitchen", mentions, 9)


def test_parser_keeps_what_it_does_not_understand() -> None:
    found, rest = parse_caption("In this park, top left is a dog, bottom is a red tree is a.")
    assert [(m.name, m.color) for m in found] == [("dog", None)]
    assert rest == ["bottom is a red tree is a"]


def test_the_prior_claims_the_companion_in_its_slot() -> None:
    claimed = missing = replaced = 0
    for i in range(3000):
        scene = make_scene("train", i)
        told = language.sft_mentions(scene, random.Random(i))
        false = [m for m in told if m.name not in scene.names()]
        expected = scenes.missing_companion(scene)
        if expected is None:
            assert told == language.true_mentions(scene)
            continue
        missing += 1
        claimed += bool(false)
        if false:
            trigger, companion, slot = expected
            assert false == [Mention(scenes.POSITIONS[slot], trigger.color, companion)]
            replaced += len(told) == len(scene.objects)
    assert 0.82 < claimed / missing < 0.88
    assert 0.63 < replaced / claimed < 0.77


def test_questions_are_answered_truthfully() -> None:
    for i in range(300):
        scene = make_scene("train", i)
        placed = {o.name: o for o in scene.objects}
        for question, answer in questions(scene, random.Random(i), 9):
            words = question.rstrip("?").split()
            if question.startswith("Is there a") and " at the " in question:
                color, name, position = words[3], words[4], " ".join(words[-2:])
                o = placed.get(name)
                truth = o is not None and (o.color, o.position) == (color, position)
                assert answer == ("Yes." if truth else "No."), question
            elif question.startswith("What is at"):
                o = scene.at(scenes.POSITIONS.index(" ".join(words[-2:])))
                assert answer == (f"A {o.color} {o.name}." if o else "Nothing.")
            elif question.startswith("Where is"):
                assert answer == f"At the {placed[words[-1]].position}."
            elif question.startswith(("List", "Look")):
                _check_list(answer, placed)


def _check_list(answer: str, placed: dict[str, scenes.Placed]) -> None:
    for item in answer.removeprefix("List: ").removeprefix("Look: ").rstrip(".").split(", "):
        words = item.split()
        if words[-1] not in ("yes", "no"):
            o = placed[words[0]]
            assert " ".join(words[1:]) in (o.color, o.position), item
        elif len(words) == 2:
            assert (words[0] in placed) == (words[1] == "yes"), item
        else:
            told = [f" {o.position} {o.color} {o.name} " for o in placed.values()]
            true = any(all(f" {word} " in text for word in words[:-1]) for text in told)
            assert true == (words[-1] == "yes"), item


def test_presence_questions_are_balanced() -> None:
    answers = [
        answer
        for i in range(1500)
        for question, answer in questions(make_scene("train", i), random.Random(i), 7)
        if question.startswith("Is there a")
    ]
    assert 0.45 < answers.count("Yes.") / len(answers) < 0.55


def test_records_carry_everything_that_is_known() -> None:
    example = world.example("probe", 4)
    scene = make_scene("probe", 4)
    assert example.id == "microworld-probe-4" and example.image.path == "microworld/probe/4.png"
    assert example.image_sha256 == example.image.sha256() and example.facts.exhaustive
    assert example.facts.scene == scene.kind and example.facts.names() == scene.names()
    assert [o.position for o in example.facts.objects] == [o.position for o in scene.objects]
    assert example == world.example("probe", 4) and world.dialogue("probe", 4).turns
