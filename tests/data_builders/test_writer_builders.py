"""ha_dpo, povid and rlaif_v with a writer in place of the rules: one that knows the microworld, and
one that fails now and then."""

import json

import pytest

from data_builders._context import BuildContext
from mlalign import methods
from mlalign.judges import Written
from mlalign.microworld import world
from mlalign.objects import vocabulary
from mlalign.records import Preference, Skip
from tests.data_builders.writers import Oracle

SCENES = 24


def built(name, writer, **settings):
    """Pairs and skips of microworld scenes, built with a writer (or by rule)."""
    context = BuildContext(
        vocabulary=vocabulary("microworld"),
        language="microworld",
        vlm=object(),
        writer=writer,
        writer_name="oracle",
    )
    method = methods.find("data_builders", name)
    builder = method(method.Settings(**settings), context)
    made = list(builder.build_many([world.example("pairs", n) for n in range(SCENES)]))
    pairs = [r for r in made if isinstance(r, Preference)]
    return builder, pairs, [r for r in made if isinstance(r, Skip)]


def core(pairs):
    return [(p.id, p.chosen, p.rejected, p.segments) for p in pairs]


def test_ha_dpo_by_a_writer_that_knows_the_truth(speaking):
    """The same descriptions as by rule, whose styles the oracle has; yes/no pairs beside them."""
    _, rule, _ = built("ha_dpo", None, yes_no=0)
    writer = Oracle()
    _, pairs, _ = built("ha_dpo", writer, yes_no=2)
    described = [p for p in pairs if p.origin["part"] == "description"]
    assert core(described) == core(rule) and len(rule) > 20
    assert {(p.origin["how"], p.origin["writer"]) for p in pairs} == {("model", "oracle")}
    asked = [p for p in pairs if p.origin["part"] == "yes_no"]
    judge = writer.judge
    assert len(asked) > 20 and writer.asked["question"] == SCENES
    for pair in asked:
        assert judge.answer(pair.facts, pair.prompt).verdict is (pair.chosen == "Yes.")


def test_ha_dpo_one_wording_of_all(speaking):
    _, every, _ = built("ha_dpo", None, yes_no=0, paraphrases=3)
    _, one, _ = built("ha_dpo", None, yes_no=0, paraphrases=3, wordings="one")
    examples = {p.origin["example"] for p in every}
    assert len(one) == len(examples) and len(every) == 3 * len(examples)
    assert set(core(one)) <= set(core(every))
    assert {p.origin["wording"] for p in one} == {0, 1, 2}


@pytest.mark.parametrize(
    ("kind", "answer", "reason"),
    [
        ("split", "no JSON", "splitting: the answer is no JSON"),
        ("check", '{"answers": []}', "checking: not as many answers as questions"),
        ("correct", Written(None, "timed out"), "correcting: timed out"),
        ("paraphrase", '{"text": ""}', "rewording: text is empty"),
    ],
)
def test_a_failed_step_is_a_counted_skip_and_harms_no_other_record(speaking, kind, answer, reason):
    _, whole, _ = built("ha_dpo", Oracle(), yes_no=0)
    ids = sorted({p.origin["example"] for p in whole})
    ill = set(ids[::2])
    builder, pairs, skips = built(
        "ha_dpo",
        Oracle(lambda asked, task: answer if asked == kind and task.id in ill else None),
        yes_no=0,
    )
    assert core(pairs) == core([p for p in whole if p.origin["example"] not in ill])
    failed = [s for s in skips if s.reason == reason]
    assert {s.id for s in failed} == ill and reason not in builder.expected


def test_povid_by_a_writer():
    def spoil(kind, task):
        caption = task.text.rsplit("Description:\n", 1)[1]
        word = "lamp" if "lamp" not in caption else "pot"
        changed = {"text": f"{caption[:-1]} and a {word}.", "put_in": word, "instead_of": ""}
        if task.id.endswith("3"):
            return "nothing of the sort"
        if "change one attribute" in task.text or task.id.endswith("7"):
            changed = {"text": None, "put_in": "", "instead_of": ""}
        return json.dumps(changed)

    builder, pairs, skips = built("povid", Oracle(spoil), pairs_per_image=2)
    reasons = {s.id[-1]: s.reason for s in skips}
    assert reasons["3"] == "corrupting: the answer is no JSON" and "corrupting" in reasons["3"]
    assert reasons["7"] == "nothing in the captions that can be made wrong"
    assert reasons["7"] in builder.expected and reasons["3"] not in builder.expected
    for pair in pairs:
        assert pair.chosen in pair.facts.captions and pair.rejected != pair.chosen
        assert pair.origin["how"] == "model" and pair.origin["errors"][0]["put_in"]
        assert pair.origin["errors"][0]["put_in"] in pair.rejected
    assert len({p.id for p in pairs}) == len(pairs) > 5


def test_rlaif_v_by_a_writer_that_knows_the_truth(speaking):
    _, rule, _ = built("rlaif_v", None, samples=4)
    writer = Oracle()
    _, pairs, _ = built("rlaif_v", writer, samples=4)
    assert core(pairs) == core(rule) and len(rule) > 3
    assert len(writer.calls) == 1, "all answers of a chunk are split in one call"


def test_rlaif_v_answers_that_are_not_split_never_win(speaking):
    """Every second answer comes back without claims or broken; neither is scored."""

    def spoil(kind, task):
        turn = sum(map(ord, task.text)) % 4
        return {0: '{"claims": []}', 1: "broken"}.get(turn)

    writer = Oracle(spoil)
    builder, pairs, skips = built("rlaif_v", writer, samples=6)
    spoilt = {
        task.text.rsplit("Text:\n", 1)[1] for task in writer.tasks() if spoil("", task) is not None
    }
    assert spoilt and pairs
    assert not spoilt & {side for p in pairs for side in (p.chosen, p.rejected)}
    assert builder.seen["answers_left_out: splitting: the answer is no JSON"] > 0
    assert builder.seen["answers_without_claims"] > 0
    done = {p.origin["example"] for p in pairs} | {s.id for s in skips}
    assert len(done) == SCENES


def test_rlaif_v_where_no_answer_is_split_the_failure_is_the_reason(speaking):
    """Not "fewer than two answers with claims", which would pass for the method's own doing."""
    builder, pairs, skips = built("rlaif_v", Oracle(lambda kind, task: "broken"), samples=3)
    assert pairs == []
    assert {s.reason for s in skips} == {"splitting: the answer is no JSON"}
    assert len(skips) == SCENES and skips[0].reason not in builder.expected


def lent(monkeypatch, **data):
    """The context that a recipe's data section lends to builders; no weights are loaded."""
    from mlalign import cli_stages
    from mlalign.recipe import from_dict

    monkeypatch.setattr("mlalign.models.loading.load_vlm", lambda *_, **__: object())
    recipe = from_dict(
        {
            "name": "test",
            "model": {"path": "builtin:microworld"},
            "data": {"source": "microworld", "builders": ["povid"], **data},
            "train": {"objective": "dpo", "learning_rate": 1e-4, "batch_size": 1, "steps": 1},
        }
    )
    source = cli_stages.source_of(recipe.data.source)
    return cli_stages._context(recipe, source, BuildContext)


def test_a_recipe_chooses_who_writes(monkeypatch):
    assert lent(monkeypatch).scribe().origin() == {"how": "rule"}
    context = lent(monkeypatch, writer="local_model", judge="facts")
    assert context.scribe().origin() == {
        "how": "model",
        "writer": "local_model builtin:microworld",
    }
    assert type(context.writer).__name__ == "LocalModel" and context.judge is not context.writer
    both = lent(monkeypatch, writer="local_model", judge="local_model")
    assert both.writer is both.judge, "one model, loaded once"
    with pytest.raises(ValueError, match=r"data\.writer: judge 'facts' .* writes no text"):
        lent(monkeypatch, writer="facts")
