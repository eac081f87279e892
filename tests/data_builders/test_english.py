"""Rules for English captions: statements, corrections and corruptions that read as people write."""

import json
import random
import re

import pytest

from data_builders._english import EnglishLanguage
from data_builders._phrases import phrases, tidy
from data_builders.sources.photo_folder import facts_of
from mlalign.judges.facts import FactsJudge
from mlalign.objects import vocabulary

WORDS = vocabulary("coco")
ENGLISH = EnglishLanguage(WORDS)
JUDGE = FactsJudge(FactsJudge.Settings(), vocabulary=WORDS)


def correct(text: str, *captions: str) -> str | None:
    facts = facts_of(captions, WORDS)
    wrong = [
        s for s in ENGLISH.statements(text) if JUDGE.answer(facts, s.question).verdict is False
    ]
    return ENGLISH.corrected(text, wrong, facts)


def well_formed(text: str) -> bool:
    """Capital, full stop, single blanks, no doubled word, articles that fit the next letter."""
    return (
        text == tidy(text)
        and text[0].upper() == text[0]
        and text.endswith(".")
        and not re.search(r"\b(\w+) \1\b", text.lower().replace("had had", ""))
        and not re.search(r"\ba [aeio]\w", text.lower().replace("a one", ""))
        and not re.search(r"\b(with|and|of|a|an|the)[.,]", text.lower())
    )


def test_statements_and_questions():
    said = ENGLISH.statements("A black and white dog chases two umbrellas.")
    assert [s.question for s in said] == [
        "Is there a dog in the image?",
        "Is the dog black?",
        "Is the dog white?",
        "Is there an umbrella in the image?",
    ]
    assert [s.attribute for s in said] == [None, "black", "white", None]


def test_phrases():
    text = "Two athletic men with a brown chow mix dog and little red balls"
    found = phrases(text, WORDS)
    assert [text[p.start : p.end] for p in found] == [
        "Two athletic men", "a brown chow mix dog", "little red balls",
    ]  # fmt: skip
    assert [p.plural for p in found] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "captions", "expected"),
    [
        ("A brown dog runs on the grass.", ["A man runs"], "A man runs on the grass."),
        ("Two dogs are running.", ["a small child plays"], "Two children are running."),
        (
            "A man plays with a dog and a ball.",
            ["A man plays with a ball"],
            "A man plays with a ball.",
        ),
        ("A dog is running with a frisbee in its mouth.", ["a dog"], "A dog is running."),
        ("A man stands in front of a car.", ["A man stands there"], "A man stands."),
        ("A man stands near a dog.", ["A man and a cat"], "A man stands near a cat."),
        ("A man holds an umbrella.", ["A man holds a handbag"], "A man holds a handbag."),
        ("A dog and a cat sleep with a ball.", ["A dog and a cat"], "A dog and a cat sleep."),
        ("Three sheep graze.", ["A cow grazes"], "Three cows graze."),
        ("A brown dog runs.", ["A black dog runs"], "A black dog runs."),
        (
            "A brown and white dog runs.",
            ["A black dog", "the white dog"],
            "A black and white dog runs.",
        ),
        ("A large black dog runs.", ["A small black dog"], "A small black dog runs."),
    ],
)
def test_corrections(text, captions, expected):
    assert correct(text, *captions) == expected


@pytest.mark.parametrize(
    "text", ["A dog runs.", "A dog is sitting on a couch.", "A man drinks a bottle."]
)
def test_what_cannot_be_mended_is_refused(text):
    assert correct(text, "grass and sky with a bench") is None


def test_wordings_differ_in_nothing_but_truth():
    facts = facts_of(["A man"], WORDS)
    text = "Two dogs and a black cat run after an old man."
    assert ENGLISH.paraphrase(text, facts, 0) == text
    assert ENGLISH.paraphrase(text, facts, 1) == "The image shows two dogs, a black cat and a man."
    assert ENGLISH.paraphrase(text, facts, 3) is None


@pytest.mark.data
@pytest.mark.parametrize("kind", ["object", "attribute", "relation"])
def test_corruptions_of_real_captions_are_false_and_well_formed(shared_data, kind):
    lines = (shared_data / "flickr8k" / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in random.Random(0).sample(lines, 250)]
    made = equal = 0
    for number, row in enumerate(rows):
        facts = facts_of(row["captions"], WORDS)
        text = ENGLISH.tidy(row["captions"][number % len(row["captions"])])
        done = ENGLISH.corrupted(text, facts, kind, random.Random(number))
        if done is None:
            continue
        made += 1
        assert done.text != text
        if well_formed(text):
            assert well_formed(done.text), done.text
        equal += ENGLISH.mentions(text) == ENGLISH.mentions(done.text)
        if kind == "object":
            assert done.word not in facts.names()
            assert done.word in {s.name for s in WORDS.objects(done.text)}, (text, done)
        elif kind == "attribute":
            assert not any(re.search(rf"\b{done.word}\b", c.lower()) for c in facts.captions)
    assert made > {"object": 130, "attribute": 60, "relation": 25}[kind]
    assert equal >= 0.9 * made


def test_joined_objects_add_one_mention():
    facts = facts_of(["A man walks"], WORDS)
    done = ENGLISH.corrupted("A man walks.", facts, "object", random.Random(3), (), 1)
    assert done is not None and ENGLISH.mentions(done.text) == 2
