"""Language work by a model: instructions, strict reading, batches."""

import json
import random
from pathlib import Path

import pytest

from data_builders import prompts
from data_builders._context import BuildContext
from data_builders._jobs import (
    Check,
    Convert,
    Correct,
    Corrupt,
    Failed,
    Paraphrase,
    Rate,
    Rating,
    Split,
    in_step,
)
from data_builders._model_language import known
from mlalign.judges import UNDECIDED, Written
from mlalign.microworld import world
from mlalign.objects import vocabulary
from mlalign.records import Example, Facts, ImageRef, ObjectFact
from tests.data_builders.writers import Scripted, kind_of

TEXT = "A dog sleeps on a red couch."
EXAMPLE = Example(
    id="photo-1",
    image=ImageRef(path="photo.png"),
    image_sha256="",
    prompt="Describe the image.",
    facts=Facts(
        objects=(ObjectFact(name="dog", attributes=("brown",), position="left"),),
        captions=("A brown dog lies on a $5 blue couch.",),
        scene="living room",
    ),
    source="test",
)
UNKNOWN = Example(
    id="photo-2", image=EXAMPLE.image, image_sha256="", prompt="?", facts=Facts(), source="test"
)
WRONG = [
    type("Claim", (), {"text": "the couch is red", "question": "Is the couch red?"}),
]

SPLIT = Split(example=EXAMPLE, text=TEXT)
CHECK = Check(example=EXAMPLE, questions=["Is there a dog?", "Is it big?", "Is there a cat?"])
CORRECT = Correct(example=EXAMPLE, text=TEXT, wrong=WRONG)
REWORD = Paraphrase(example=EXAMPLE, text=TEXT, number=1)
CONVERT = Convert(example=EXAMPLE, statements=["a dog lies there", "the couch is blue"])
RATE = Rate(example=EXAMPLE, text=TEXT, aspect="Helpfulness", rubric="rubric_helpfulness")


def corrupt(kind="object", **more):
    return Corrupt(example=EXAMPLE, text=TEXT, kind=kind, rng=random.Random(0), **more)


GOOD = {
    "split": (SPLIT, {"claims": [{"claim": "there is a dog", "question": "Is there a dog?"}]}),
    "split, nothing said": (SPLIT, {"claims": []}),
    "check": (CHECK, {"answers": ["yes", "unknown", "no"]}),
    "correct": (CORRECT, {"corrected": "a dog sleeps on a blue couch"}),
    "correct, nothing left": (CORRECT, {"corrected": None}),
    "reword": (REWORD, {"text": "On a red couch a dog sleeps."}),
    "convert": (CONVERT, {"questions": ["Is there a dog?", "Is the couch blue?"]}),
    "rate": (RATE, {"rating": 4, "rationale": "clear", "more": "is left alone"}),
    "corrupt": (
        corrupt(),
        {"text": "A cat sleeps on a red couch.", "put_in": "cat", "instead_of": "dog"},
    ),
    "corrupt, cannot": (corrupt(), {"text": None, "put_in": "", "instead_of": ""}),
}


def scribe(writer):
    return BuildContext(
        vocabulary=vocabulary("coco"),
        language="english",
        seed=5,
        writer=writer,
        writer_name="server some-model",
    ).scribe()


def done(job, answer):
    text = answer if isinstance(answer, (str, Written)) else json.dumps(answer)
    (result,) = scribe(Scripted(lambda task: text)).do([job])
    return result


def test_good_answers_are_read():
    results = {name: done(*case) for name, case in GOOD.items()}
    (claim,) = results["split"]
    assert (claim.text, claim.question, claim.object) == (
        "there is a dog",
        "Is there a dog?",
        "dog",
    )
    assert (claim.start, claim.end) == (0, len(TEXT))
    assert results["split, nothing said"] == []
    assert [results["check"][q].verdict for q in CHECK.questions] == [True, None, False]
    assert results["check"]["Is it big?"] is UNDECIDED
    assert results["correct"] == "A dog sleeps on a blue couch.", "as the source writes texts"
    assert results["correct, nothing left"] is None and results["corrupt, cannot"] is None
    assert results["reword"] == "On a red couch a dog sleeps."
    assert results["convert"] == ["Is there a dog?", "Is the couch blue?"]
    assert results["rate"] == Rating(4.0, "clear")
    made = results["corrupt"]
    assert (made.text, made.kind, made.word, made.was) == (
        "A cat sleeps on a red couch.",
        "object",
        "cat",
        "dog",
    )


@pytest.mark.parametrize("name", GOOD)
def test_one_fenced_block_is_tolerated(name):
    job, answer = GOOD[name]
    for opening in ("```json\n", "```\n"):
        assert done(job, f"\n{opening}{json.dumps(answer, indent=1)}\n```\n") == done(job, answer)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: "", "the answer is empty"),
        (lambda text: "I am sorry, I cannot help.", "the answer is no JSON"),
        (lambda text: f"Here you are: {text}", "the answer is no JSON"),
        (lambda text: f"```json\n{text}\n```\nI hope this helps.", "the answer is no JSON"),
        (lambda text: text[:-1], "the answer is no JSON"),
        (lambda text: f"[{text}]", "the answer is JSON but no object"),
        (lambda text: "{}", "the answer lacks the key"),
        (lambda text: Written(None, "no answer after 5 attempts"), "no answer after 5 attempts"),
        (lambda text: Written(None), "no answer"),
    ],
)
def test_anything_else_is_a_failure_with_its_reason(name, spoil, reason):
    job, answer = GOOD[name]
    result = done(job, spoil(json.dumps(answer)))
    assert isinstance(result, Failed)
    verb, _, why = result.reason.partition(": ")
    assert verb.endswith("ing") and why.startswith(reason)


@pytest.mark.parametrize(
    ("job", "answer", "reason"),
    [
        (SPLIT, {"claims": "there is a dog"}, "splitting: claims is no list of objects"),
        (SPLIT, {"claims": [{"claim": "a dog"}]}, "splitting: a claim lacks the key question"),
        (SPLIT, {"claims": [{"claim": " ", "question": "?"}]}, "splitting: claims is empty"),
        (CHECK, {"answers": ["yes", "no"]}, "checking: not as many answers as questions"),
        (
            CHECK,
            {"answers": ["yes", "no", "Yes"]},
            "checking: an answer is neither yes, no nor unknown",
        ),
        (CHECK, {"answers": [True, False, None]}, "checking: answers is not text"),
        (CORRECT, {"corrected": ""}, "correcting: corrected is empty"),
        (CORRECT, {"corrected": ["a"]}, "correcting: corrected is not text"),
        (REWORD, {"text": "  "}, "rewording: text is empty"),
        (REWORD, {"text": "..."}, "rewording: text is empty"),
        (REWORD, {"text": None}, "rewording: text is null"),
        (CONVERT, {"questions": ["one?"]}, "asking: not as many questions as statements"),
        (RATE, {"rating": "4", "rationale": "r"}, "rating: rating is not a number"),
        (RATE, {"rating": 0, "rationale": "r"}, "rating: rating is not within 1 to 5"),
        (RATE, {"rating": 4}, "rating: the answer lacks the key rationale"),
        (
            corrupt(),
            {"text": "A dog sleeps here.", "put_in": "cat", "instead_of": ""},
            "corrupting: the text lacks what was put in",
        ),
        (
            corrupt(),
            {"text": TEXT, "put_in": "couch", "instead_of": "dog"},
            "corrupting: the text is unchanged",
        ),
        (
            corrupt(),
            {"text": "A puppy sleeps.", "put_in": "puppy", "instead_of": "dog"},
            "corrupting: what was put in is there",
        ),
        (
            corrupt("attribute"),
            {"text": "A dog sleeps.", "put_in": 3, "instead_of": "dog"},
            "corrupting: put_in or instead_of is no text",
        ),
    ],
)
def test_answers_of_the_wrong_content(job, answer, reason):
    result = done(job, answer)
    assert isinstance(result, Failed) and result.reason == reason


def test_same_claim_twice_is_one():
    claim = {"claim": "there is a dog", "question": "Is there a dog?"}
    assert len(done(SPLIT, {"claims": [claim, claim]})) == 1


def test_a_chunk_goes_out_together_in_order():
    jobs = [job for job, _ in GOOD.values()] * 3
    answers = [json.dumps(answer) for _, answer in GOOD.values()] * 3
    by_kind = {}
    for job, answer in zip(jobs, answers, strict=True):
        by_kind.setdefault(type(job), []).append(answer)
    taken = {"split": Split, "check": Check, "correct": Correct, "paraphrase": Paraphrase,
             "question": Convert, "rate": Rate, "corrupt": Corrupt}  # fmt: skip
    writer = Scripted(lambda task: by_kind[taken[kind_of(task.text)]].pop(0))
    results = scribe(writer).do(jobs)
    assert results == [done(job, answer) for job, answer in zip(jobs, answers, strict=True)]
    assert len(writer.calls) == 2, "one call for each limit of tokens"
    assert all((call[2], call[3]) == (0.0, 5) for call in writer.calls)
    assert all(task.id == "photo-1" for task in writer.tasks())
    assert scribe(writer).origin() == {"how": "model", "writer": "server some-model"}


def test_what_a_task_shows():
    seen = {}
    for name, (job, answer) in GOOD.items():
        writer = Scripted(lambda task, answer=answer: json.dumps(answer))
        scribe(writer).do([job])
        (seen[name],) = writer.tasks()
    assert [n for n, task in seen.items() if task.image is not None] == ["rate"]
    for name, task in seen.items():
        assert task.text.count(TEXT) == (name not in ("check", "convert"))
        tells = name in ("check", "correct", "correct, nothing left", "corrupt", "corrupt, cannot")
        assert ("a $5 blue couch" in task.text) == tells
    assert "1. Is there a dog?\n2. Is it big?\n3. Is there a cat?" in seen["check"].text
    assert "1. the couch is red" in seen["correct"].text
    assert prompts.lines("paraphrase_styles")[1] in seen["reword"].text
    both = Rate(**{**vars(RATE), "show": "both"})
    facts = Rate(**{**vars(RATE), "show": "facts"})
    writer = Scripted(lambda task: '{"rating": 1, "rationale": "r"}')
    scribe(writer).do([both, facts])
    shown = [(task.image is not None, "$5 blue" in task.text) for task in writer.tasks()]
    assert shown == [(True, True), (False, True)]


def test_kinds_of_corruption_have_instructions_of_their_own():
    writer = Scripted(lambda task: '{"text": null, "put_in": "", "instead_of": ""}')
    jobs = [corrupt(kind, avoid=("couch",)) for kind in ("object", "attribute", "relation")]
    assert scribe(writer).do([*jobs, corrupt(change=1)]) == [None] * 4
    texts = [task.text for task in writer.tasks()]
    assert len(set(texts)) == 4 and all("as they are: couch" in text for text in texts[:3])
    assert "occurs together" in texts[0] and "attribute" in texts[1] and "relation" in texts[2]


def test_nothing_is_asked_where_there_is_nothing_to_ask():
    def never(task):
        raise AssertionError(task)

    empty = [
        Check(example=EXAMPLE, questions=[]),
        Convert(example=EXAMPLE, statements=[]),
        Split(example=EXAMPLE, text=" "),
        Check(example=UNKNOWN, questions=["Is there a dog?"]),
        Rate(**{**vars(RATE), "example": UNKNOWN, "show": "facts"}),
    ]
    reason = "nothing is known of the image"
    assert scribe(Scripted(never)).do(empty) == [
        {}, [], [], Failed(f"checking: {reason}"), Failed(f"rating: {reason}"),
    ]  # fmt: skip


def test_known_says_whether_more_may_be_there():
    told = known(EXAMPLE.facts)
    assert "living room" in told and "- brown dog, left" in told and "may be more" in told
    whole = known(world.example("pairs", 0).facts)
    assert "this is all there is" in whole and known(Facts()) == ""


def test_every_instruction_is_used_and_none_is_missing():
    folder = Path(prompts.__file__).parent
    code = "".join(p.read_text() for p in folder.parent.glob("*.py"))
    names = sorted(p.stem for p in folder.glob("*.txt"))
    assert len(names) > 10
    for name in names:
        stem = "corrupt_{job.kind}" if name.startswith("corrupt_") else name
        assert f'"{stem}"' in code, f"{name}.txt is read by nothing"
    with pytest.raises(KeyError):
        prompts.fill("split")
    assert len(prompts.lines("paraphrase_styles")) == 4


def test_works_run_in_step():
    rounds = []

    def work(number, length):
        total = 0
        for _ in range(length):
            total += yield (number, length)
        return number, total

    def do(jobs):
        rounds.append([number for number, _ in jobs])
        return [length for _, length in jobs]

    lengths = [2, 0, 3, 1]
    works = [work(n, length) for n, length in enumerate(lengths)]
    assert in_step(works, do) == [(n, length * length) for n, length in enumerate(lengths)]
    assert rounds == [[0, 2, 3], [0, 2], [2]]
    assert in_step([], do) == []
