"""The three builders on microworld scenes, with a stand-in that speaks from the prior."""

from collections import Counter
from typing import Any

import pytest

from data_builders import engine
from data_builders._pairs import CHOSEN_MENTIONS, REJECTED_MENTIONS
from data_builders.sources.microworld import METHOD as MICROWORLD
from mlalign import methods, store
from mlalign.judges.facts import FactsJudge
from mlalign.microworld.language import caption, parse_caption, true_mentions
from mlalign.microworld.scenes import make_scene
from mlalign.objects import vocabulary
from mlalign.records import Preference

BUILDERS = ("ha_dpo", "povid", "rlaif_v")


def examples(limit=120, split="train") -> list[Any]:
    return list(MICROWORLD(MICROWORLD.Settings()).examples(split, limit, 0))


def make(name, context, **settings):
    method = methods.find("data_builders", name)
    return method(method.Settings(**settings), context)


def build(name, context, folder, limit=120, **settings):
    manifest = engine.build(
        make(name, context, **settings), examples(limit), out_folder=folder, max_skipped=0.1
    )
    pairs = [p for p in store.read_preferences(folder) if isinstance(p, Preference)]
    assert len(pairs) == manifest["pairs"]
    return manifest, pairs


def described(pairs):
    return [p for p in pairs if CHOSEN_MENTIONS in p.scores]


def wrong(pair, side):
    """Statements of one side that the scene denies."""
    judge = FactsJudge(FactsJudge.Settings(), vocabulary=vocabulary("microworld"))
    asked = [
        f"Is there a {m.color} {m.name} at the {m.position}?"
        for m in parse_caption(getattr(pair, side))[0]
    ]
    return [q for q in asked if judge.answer(pair.facts, q).verdict is False]


@pytest.mark.parametrize("name", BUILDERS)
def test_same_seed_same_bytes(name, context, speaking, tmp_path):
    first, _ = build(name, context, tmp_path / "a", 60)
    second, _ = build(name, context, tmp_path / "b", 60)
    assert first["sha256"] == second["sha256"]


@pytest.mark.parametrize("name", BUILDERS)
def test_what_holds_for_every_pair(name, context, speaking, tmp_path):
    manifest, pairs = build(name, context, tmp_path / "out")
    by_id = {e.id: e for e in examples()}
    assert len({p.id for p in pairs}) == len(pairs) > 20
    for pair in pairs:
        example = by_id[pair.origin["example"]]
        assert pair.id.startswith(f"{name}-{example.id}-")
        assert pair.image_sha256 == example.image_sha256 == pair.image.sha256()
        assert pair.chosen != pair.rejected
        assert pair.origin["how"] == "rule"
        for segment in pair.segments:
            text = pair.chosen if segment.side == "chosen" else pair.rejected
            assert text[segment.start : segment.end].strip() == text[segment.start : segment.end]
    assert manifest["equal_mention_share"] >= 0.8
    counts = [
        Counter(round(p.scores[key]) for p in described(pairs))
        for key in (CHOSEN_MENTIONS, REJECTED_MENTIONS)
    ]
    total = len(described(pairs))
    for number in range(1, 8):
        assert abs(counts[0][number] - counts[1][number]) <= max(5, 0.12 * total)


def test_povid_sides(context, speaking, tmp_path):
    _, pairs = build("povid", context, tmp_path / "out")
    places = Counter()
    for pair in pairs:
        scene = make_scene("pairs", int(pair.origin["example"].split("-")[-1]))
        assert pair.chosen == caption(scene.kind, true_mentions(scene))
        assert not wrong(pair, "chosen") and wrong(pair, "rejected")
        assert parse_caption(pair.rejected)[1] == []
        for error in pair.origin["errors"]:
            if error["kind"] == "object":
                assert error["put_in"] not in pair.facts.names()
        changed = next(s.start for s in pair.segments if s.side == "rejected")
        places[round(3 * changed / len(pair.rejected))] += 1
    assert min(places[place] for place in range(3)) > len(pairs) / 20


def test_povid_words_tell_nothing(context, speaking, tmp_path):
    """An object is about as often the added as the removed one: no word is wrong in itself."""
    _, pairs = build("povid", context, tmp_path / "out", 800, kinds={"object": 1.0})
    added, removed = Counter(), Counter()
    for pair in pairs:
        sides = [Counter(m.name for m in parse_caption(t)[0]) for t in (pair.chosen, pair.rejected)]
        removed.update(sides[0] - sides[1])
        added.update(sides[1] - sides[0])
    share = [added[n] / (added[n] + removed[n]) for n in added | removed]
    assert max(abs(s - 0.5) for s in share) < 0.25


def test_ha_dpo_corrects_and_keeps_one_style(context, speaking, tmp_path):
    manifest, pairs = build("ha_dpo", context, tmp_path / "out")
    for pair in described(pairs):
        assert not wrong(pair, "chosen") and wrong(pair, "rejected")
        assert pair.chosen.split()[:2] == pair.rejected.split()[:2]
    wordings = Counter(p.origin["wording"] for p in described(pairs))
    assert set(wordings) == {0, 1, 2}
    asked = [p for p in pairs if p.origin["part"] == "yes_no"]
    truths = Counter(p.chosen for p in asked)
    assert abs(truths["Yes."] - truths["No."]) <= 0.05 * len(asked)
    judge = FactsJudge(FactsJudge.Settings(), vocabulary=vocabulary("microworld"))
    for pair in asked:
        assert {pair.chosen, pair.rejected} == {"Yes.", "No."}
        assert judge.answer(pair.facts, pair.prompt).verdict is (pair.chosen == "Yes.")
    mistaken = sum(p.origin["model_mistaken"] for p in asked)
    assert mistaken > 0.3 * len(asked), "mistakes come first"
    assert manifest["skipped"]["nothing wrong in the description"]["expected"]


def test_ha_dpo_only_mistakes(context, speaking, tmp_path):
    _, pairs = build("ha_dpo", context, tmp_path / "out", 80, only_mistakes=True, paraphrases=0)
    assert pairs and all(p.origin["model_mistaken"] for p in pairs)


def test_rlaif_v_scores_and_reports_its_judge(context, speaking, tmp_path):
    manifest, pairs = build("rlaif_v", context, tmp_path / "out")
    per_prompt = Counter(p.origin["example"] for p in pairs)
    assert max(per_prompt.values()) <= 2
    for pair in pairs:
        assert pair.scores["chosen"] - pair.scores["rejected"] >= 1
        for side in ("chosen", "rejected"):
            rejected = sum(c.p_no > c.p_yes for c in pair.claims if c.side == side)
            assert pair.scores[side] == -rejected
    against = manifest["judge_against_facts"]
    assert against["questions"] > 300 and 0.85 < against["accuracy"] < 0.95


def test_rlaif_v_an_answer_without_claims_never_wins(context, speaking, tmp_path, monkeypatch):
    from tests.data_builders.conftest import say

    def shy(vlm, requests, decoding, **more):
        return [
            [text if i % 2 else "A nice picture." for i, text in enumerate(samples)]
            for samples in say(vlm, requests, decoding, **more)
        ]

    monkeypatch.setattr("data_builders.rlaif_v.generate", shy)
    manifest, pairs = build("rlaif_v", context, tmp_path / "out", 60)
    assert all("nice" not in p.chosen + p.rejected for p in pairs)
    assert manifest["seen"]["answers_without_claims"] == 5 * 60


def test_chunks_do_not_matter(context, speaking):
    def run(chunk):
        builder = make("povid", context, chunk=chunk)
        records = examples(40)
        out = [r for i in range(0, 40, chunk) for r in builder.build_many(records[i : i + chunk])]
        made = builder.finish([p for p in out if isinstance(p, Preference)])
        return [p.id + p.rejected for p in made if isinstance(p, Preference)]

    assert run(7) == run(64)
