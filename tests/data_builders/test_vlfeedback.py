"""vlfeedback on the microworld: rated by rule over planted facts, and by a scripted writer."""

import json
import re
from itertools import combinations

import pytest
from pydantic import ValidationError

from data_builders._context import BuildContext
from data_builders.vlfeedback import METHOD as VLFEEDBACK
from mlalign.judges import Written
from mlalign.microworld import world
from mlalign.objects import vocabulary
from mlalign.records import ImageRef, Preference, Skip
from tests.data_builders.conftest import say
from tests.data_builders.test_rlhf_v import false_statements
from tests.data_builders.writers import Scripted

ASPECTS = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")


@pytest.fixture(autouse=True)
def speaking_model(monkeypatch):
    monkeypatch.setattr("data_builders.vlfeedback.generate", say)


def make(writer=None, **settings):
    context = BuildContext(
        vocabulary=vocabulary("microworld"),
        language="microworld",
        vlm=object(),
        writer=writer,
        writer_name="rater" if writer else "",
    )
    return VLFEEDBACK(VLFEEDBACK.Settings(**settings), context)


def run(writer=None, scenes=60, chunk=16, **settings):
    builder = make(writer, **settings)
    examples = [world.example("pairs", number) for number in range(scenes)]
    out = [
        record
        for start in range(0, scenes, chunk)
        for record in builder.build_many(examples[start : start + chunk])
    ]
    pairs = [r for r in out if isinstance(r, Preference)]
    assert list(builder.finish(pairs)) == pairs
    return builder, pairs, [r for r in out if isinstance(r, Skip)]


def rater(ratings):
    """Rates ``{text: (helpfulness, faithfulness, ethics)}``, raw JSON values, 3 for others."""

    def answer(task):
        aspect = re.search(r"^Aspect: (.*)$", task.text, re.MULTILINE)[1]
        text = task.text.rsplit("Response:\n", 1)[1].split("\n\nGive a whole number")[0]
        value = ratings.get(text, (3, 3, 3))[ASPECTS.index(aspect)]
        if isinstance(value, Written):
            return value
        return json.dumps({"rationale": f"because of {aspect}", "rating": value})

    return Scripted(answer)


def says(monkeypatch, *texts):
    """The pool's members answer with these, in order."""
    members = iter(texts)
    spoken = lambda vlm, requests, decoding, **_: [[text] * 1 for text in [next(members)]]  # noqa: E731
    monkeypatch.setattr("data_builders.vlfeedback.generate", spoken)


def test_by_rule_the_chosen_answer_has_fewer_false_statements():
    builder, pairs, skips = run()
    assert len(pairs) > 10
    for pair in pairs:
        wrong = [
            len(false_statements(pair.id, pair.facts, text))
            for text in (pair.chosen, pair.rejected)
        ]
        assert wrong[0] < wrong[1]
        assert pair.scores["chosen"] > pair.scores["rejected"]
        assert pair.scores["chosen Ethical Considerations"] == 5
        assert "constant" in pair.origin["how"]
    assert {s.reason for s in skips} <= builder.expected
    done = {p.origin["example"] for p in pairs} | {s.id for s in skips}
    assert done == {f"microworld-pairs-{n}" for n in range(60)}, "nothing is lost uncounted"


def test_rule_ratings_by_hand(monkeypatch):
    """Two of four objects named, and a third that is not there."""
    example = next(
        e for e in (world.example("pairs", n) for n in range(99)) if len(e.facts.objects) == 4
    )
    a, b = example.facts.objects[:2]
    absent = next(n for n in vocabulary("microworld").names if n not in example.facts.names())
    true = [f"{o.position} is a {o.attributes[0]} {o.name}" for o in (a, b)]
    good = f"In this {example.facts.scene}, {true[0]} and {true[1]}."
    bad = f"In this {example.facts.scene}, {true[0]}, {true[1]} and top left is a red {absent}."
    says(monkeypatch, good, bad)
    (pair,) = make(pool=[{}, {}]).build_many([example])
    assert (pair.chosen, pair.rejected) == (good, bad)
    assert pair.scores["chosen Helpfulness"] == pair.scores["rejected Helpfulness"] == 1 + 4 * 2 / 4
    assert pair.scores["chosen Visual Faithfulness"] == 5
    assert pair.scores["rejected Visual Faithfulness"] == pytest.approx(5 - 4 / 3)
    assert pair.scores["rejected"] == pytest.approx((3 + 5 - 4 / 3 + 5) / 3)


def test_all_untied_pairs_of_the_mean(monkeypatch):
    texts = ["one", "two", "three", "four"]
    ratings = {"one": (5, 5, 5), "two": (1, 4, 4), "three": (4, 4, 1), "four": (1, 1, 1.5)}
    says(monkeypatch, *texts)
    writer = rater(ratings)
    builder = make(writer)
    pairs = list(builder.build_many([world.example("pairs", 0)]))
    means = {text: sum(values) / 3 for text, values in ratings.items()}
    expected = {
        tuple(sorted(two, key=lambda t: -means[t]))
        for two in combinations(texts, 2)
        if means[two[0]] != means[two[1]]
    }
    assert {(p.chosen, p.rejected) for p in pairs} == expected and len(pairs) == 5
    assert builder.seen["ties"] == 1
    assert len({p.id for p in pairs}) == 5
    first = pairs[0]
    assert first.scores["chosen"] == pytest.approx(means[first.chosen])
    assert first.origin["rationales"]["chosen"]["Helpfulness"] == "because of Helpfulness"
    assert (first.origin["how"], first.origin["writer"]) == ("model", "rater")
    assert all(isinstance(task.image, ImageRef) for task in writer.tasks())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("4", "rating: rating is not a number"),
        (True, "rating: rating is not a number"),
        (float("nan"), "rating: rating is not a number"),
        (None, "rating: rating is not a number"),
        (6, "rating: rating is not within 1 to 5"),
        (Written(None, "no answer after 5 attempts"), "rating: no answer after 5 attempts"),
    ],
)
def test_a_rating_that_is_no_number_is_counted_and_never_a_default(monkeypatch, value, reason):
    says(monkeypatch, "one", "two", "three")
    writer = rater({"one": (5, 5, 5), "two": (1, value, 1), "three": (2, 2, 2)})
    builder = make(writer, pool=[{}, {}, {}])
    (pair,) = builder.build_many([world.example("pairs", 0)])
    assert (pair.chosen, pair.rejected) == ("one", "three")
    assert builder.seen[f"answers_left_out: {reason}"] == 1
    says(monkeypatch, "one", "two")
    builder = make(writer, pool=[{}, {}])
    (skip,) = builder.build_many([world.example("pairs", 0)])
    assert isinstance(skip, Skip) and skip.reason == reason and skip.reason not in builder.expected


def test_ties_repeats_and_empty_answers(monkeypatch):
    example = world.example("pairs", 0)
    says(monkeypatch, "one", "two")
    (skip,) = (tied := make(rater({}), pool=[{}, {}])).build_many([example])
    assert skip.reason in tied.expected and tied.seen["ties"] == 1
    says(monkeypatch, "one", "one")
    (skip,) = (same := make(rater({}), pool=[{}, {}])).build_many([example])
    assert skip.reason == "fewer than two different answers"
    assert same.seen["answers_repeated"] == 1
    says(monkeypatch, "", "one")
    (skip,) = make(rater({"": (5, 5, 5)}), pool=[{}, {}]).build_many([example])
    assert skip.reason == "rating: the answer is empty"


def test_an_answer_that_the_facts_cannot_decide_does_not_win(monkeypatch):
    example = world.example("pairs", 0)
    says(monkeypatch, "A nice picture.", example.facts.captions[0])
    builder = make(pool=[{}, {}])
    (skip,) = builder.build_many([example])
    assert skip.reason == "rating: the answer states nothing that the facts decide"


def test_cap_and_members():
    _, every, _ = run(scenes=40)
    builder, capped, _ = run(scenes=40, pairs_per_prompt=1)
    ids = {p.origin["example"] for p in every}
    assert {p.origin["example"] for p in capped} == ids and len(capped) == len(ids)
    assert {(p.chosen, p.rejected) for p in capped} <= {(p.chosen, p.rejected) for p in every}
    pool = [{"temperature": t / 10} for t in range(6)]
    builder, pairs, _ = run(scenes=40, pool=pool, answers_per_prompt=3)
    assert builder.seen["answers"] == 3 * 40
    used = {m["temperature"] for p in pairs for m in p.origin["members"]}
    assert len(used) > 4, "members are drawn anew for each prompt"


def test_chunks_do_not_matter():
    small, large = run(chunk=5)[1], run(chunk=60)[1]
    assert [(p.id, p.chosen, p.rejected) for p in small] == [
        (p.id, p.chosen, p.rejected) for p in large
    ]


def test_pool_as_names_loads_each_model_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "mlalign.models.loading.load_vlm_from",
        lambda path, **more: loaded.append((path, more["image"])) or object(),
    )
    builder = VLFEEDBACK(
        VLFEEDBACK.Settings(pool=["org/one", {"model": "org/two", "image": "pad"}]),
        BuildContext(vocabulary=vocabulary("microworld"), language="microworld"),
    )
    for number in range(2):
        list(builder.build_many([world.example("pairs", number)]))
    assert loaded == [("org/one", "crop"), ("org/two", "pad")]


def test_a_pool_of_one_is_refused():
    with pytest.raises(ValidationError, match="pool"):
        VLFEEDBACK.Settings(pool=["org/one"])
