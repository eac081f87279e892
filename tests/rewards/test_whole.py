"""Rewards of the answer as a whole: by hand, at their borders, and for answers that say nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from mlalign import methods
from mlalign.microworld import world
from mlalign.objects import vocabulary
from mlalign.records import ObjectFact
from mlalign.rewards._reward import RewardContext, RewardError, checked
from tests.rewards.answers import context, example, said


def made(name: str, lent: RewardContext | None = None, **settings: Any) -> Any:
    method = methods.find("mlalign.rewards", name)
    return method(method.Settings(**settings), lent or context())


def totals(name: str, *answers: Any, lent: RewardContext | None = None, **settings: Any) -> Any:
    return [s.total for s in checked(name, made(name, lent, **settings), answers)]


def test_coverage_is_the_share_of_what_matters():
    seen = example(
        objects=(ObjectFact(name="dog"), ObjectFact(name="person")),
        captions=("A cat.", "A cat and a man."),
    )
    answers = [said(t, seen) for t in ("", "A dog, a dog!", "A man with a cat and a dog.", "A bus")]
    assert totals("coverage", *answers) == [0, pytest.approx(1 / 3), 1, 0]
    assert totals("coverage", answers[2], min_captions=2) == [1]
    assert totals("coverage", said("A dog.", seen), min_captions=None) == [0.5]


def test_coverage_counts_what_captions_repeat():
    seen = example(captions=("A cat.", "A cat and a bus.", "A cat"))
    assert totals("coverage", said("a cat", seen), min_captions=1) == [0.5]
    assert totals("coverage", said("a cat", seen), min_captions=2) == [1]


def test_coverage_leaves_out_what_is_small():
    scene = world.example("pairs", 0)
    lent = RewardContext(vocabulary=vocabulary("microworld"))
    names = [o.name for o in scene.facts.objects]
    answer = said(f"a {names[0]}", scene)
    options = {"min_captions": None, "lent": lent}
    assert totals("coverage", answer, **options) == [1 / len(names)]
    (out,) = made("coverage", lent, min_captions=None, min_area=1.0)([answer])
    assert (out.total, out.counts["nothing"]) == (0, 1)


def test_coverage_without_anything_to_cover_and_without_a_vocabulary():
    bare = example(objects=(ObjectFact(name="unheard of"),))
    (out,) = made("coverage")([said("a dog", bare)])
    assert (out.total, dict(out.counts)) == (0, {"salient": 0, "covered": 0, "nothing": 1})
    with pytest.raises(ValueError, match=r"coverage needs a vocabulary: give data\.vocabulary"):
        made("coverage", RewardContext())


def test_length_costs_ten_at_the_limit():
    long, empty = said(" ".join(["dog"] * 895)), said("")
    assert len(long.token_ids) == 896
    assert totals("length_penalty", long, empty) == [-10, pytest.approx(-10 / 896)]
    half = said("a dog", length_bonus=0.5)
    assert totals("length_penalty", half, scale=4, limit=6) == [-1]
    exempt = said("a dog", replace(example(), length_bonus=0.0))
    assert totals("length_penalty", exempt) == [0]


def test_an_answer_that_never_ends():
    cut, whole = said("a dog and", stopped=False), said("a dog")
    assert totals("no_stop", cut, whole, said("")) == [-8, 0, 0]
    assert totals("no_stop", cut, penalty=1.5) == [-1.5]


def closed(gold: str | None, *texts: str, **settings: Any) -> list[float]:
    return totals("correctness", *[said(t, example(answer=gold)) for t in texts], **settings)


def test_correctness_of_options_is_a_test_on_letter_and_stop():
    texts = ("B. a dog", "B.", "B", "B a dog", "A. a cat", "The answer is B.", "")
    for gold in ("B", "B.", "B. a dog"):
        assert closed(gold, *texts) == [2, 2, 0, 0, 0, 0, 0]
    reasoned = ("It barks. So the correct option is B.", "the correct option is A. Not B.", "is B.")
    assert closed("B", *reasoned) == [2, 0, 0]


def test_correctness_of_yes_and_no_is_as_released():
    texts = ("No.", "no, there is none", "Yes, there is.", "Nobody knows", "")
    for gold in ("No", "no", "No."):
        assert closed(gold, *texts) == [1, 1, -1, 0, 0]
    assert closed("Yes.", *texts) == [0] * 5
    assert closed("Yes", *texts, yes=0.5) == [-1, -1, 1, 0, 0]


@pytest.mark.parametrize("gold", [None, "", "A dog on a bench.", "BMW", "Nothing", "yes and no"])
def test_open_questions_are_counted(gold: str | None):
    (out,) = made("correctness")([said("Yes.", example(answer=gold))])
    assert (out.total, out.counts) == (0, {"open": 1})


def test_format_matches_the_whole_answer():
    answers = [said(t) for t in ("Yes.", "yes", "Yes. Or no", "")]
    assert totals("format", *answers, pattern=r"(Yes|No)\.?") == [0, -1, -1, -1]
    assert totals("format", *answers, pattern=r"(Yes|No)\.?", ignore_case=True)[1] == 0
    assert totals("format", said("a\nb."), pattern=r".*[.!?]", right=1.0) == [1]
    marks = r"(?!.*\?\s*\?).*"
    assert totals("format", said("What? ? ?"), said("What?"), pattern=marks) == [-1, 0]


def test_format_refuses_what_is_no_expression():
    with pytest.raises(ValidationError, match="no regular expression"):
        made("format", pattern="(")
    with pytest.raises(ValidationError, match="pattern"):
        made("format")


def by_length(queries: Any) -> list[list[float]]:
    return [[float(end - start) for start, end in query.spans] for query in queries]


def test_reward_model_of_answers_has_no_spans():
    reward = made("reward_model", context(score=by_length), offset=1.0, scale=2.0)
    assert reward.spans is False
    out = checked("reward_model", reward, [said("a dog"), said("")])
    assert [s.total for s in out] == [8, -2]


def test_reward_model_of_sentences_scores_each():
    text = "A dog. It runs! See?"
    reward = made("reward_model", context(score=by_length), form="sentence")
    (out, empty) = checked("reward_model", reward, [said(text), said("")])
    assert [(text[a:b], s) for a, b, s in out.spans] == [
        ("A dog.", 6),
        ("It runs!", 8),
        ("See?", 4),
    ]
    assert (out.total, empty.total, empty.spans) == (18, 0, ())
    mean = made("reward_model", context(score=by_length), form="sentence", average=True)
    (out,) = checked("reward_model", mean, [said(text)])
    assert out.total == pytest.approx(6)
    assert [s.score for s in out.spans] == pytest.approx([2, 8 / 3, 4 / 3])


@pytest.mark.parametrize(
    ("score", "problem"),
    [
        (lambda queries: [], "record 'e#0': the model gave scores for 0 of 1 answers"),
        (lambda queries: [[1.0]], "record 'e#0': the model gave 1 scores for 2 spans"),
        (lambda queries: [[1.0, float("nan")]], "record 'e#0': a score of nan"),
    ],
)
def test_reward_model_that_gives_what_cannot_be_used(score: Any, problem: str):
    reward = made("reward_model", context(score=score), form="sentence")
    with pytest.raises(RewardError, match=re.escape(problem)):
        checked("reward_model", reward, [said("A dog. It runs.")])


def test_reward_model_needs_a_model():
    with pytest.raises(ValueError, match="reward_model has no model"):
        made("reward_model")


def test_sentences_are_cut_as_the_released_ratings_were():
    from mlalign.objects import sentences

    for text, cut in (
        ("A dog. It runs!", ["A dog.", "It runs!"]),
        ('He said "stop." Then', ['He said "stop."', "Then"]),
        ("3.5 m tall?! (yes.) x", ["3.5 m tall?!", "(yes.)", "x"]),
        (" \n", []),
        ("a\nb. c", ["a\nb.", "c"]),
    ):
        assert [text[start:end] for start, end in sentences(text)] == cut
