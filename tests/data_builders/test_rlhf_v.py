"""rlhf_v on the microworld: the scene is the ground truth for what had to be corrected."""

import pytest

from data_builders._context import BuildContext
from data_builders.edits import words
from data_builders.rlhf_v import METHOD as RLHF_V
from mlalign.judges.facts import FactsJudge
from mlalign.microworld import world
from mlalign.microworld.language import parse_caption
from mlalign.objects import vocabulary
from mlalign.records import Preference, Skip
from tests.data_builders.conftest import say, scene_of
from tests.data_builders.test_edits import outside
from tests.data_builders.writers import Oracle

SCENES = 80


@pytest.fixture(autouse=True)
def speaking_model(monkeypatch):
    monkeypatch.setattr("data_builders.rlhf_v.generate", say)


def run(writer=None, scenes=SCENES, chunk=32, **settings):
    context = BuildContext(
        vocabulary=vocabulary("microworld"),
        language="microworld",
        vlm=object(),
        writer=writer,
        writer_name="oracle" if writer else "",
    )
    builder = RLHF_V(RLHF_V.Settings(**settings), context)
    examples = [world.example("pairs", number) for number in range(scenes)]
    out = [
        record
        for start in range(0, scenes, chunk)
        for record in builder.build_many(examples[start : start + chunk])
    ]
    pairs = [r for r in out if isinstance(r, Preference)]
    assert list(builder.finish(pairs)) == pairs
    return builder, pairs, [r for r in out if isinstance(r, Skip)]


def false_statements(example_id, facts, text):
    judge = FactsJudge(FactsJudge.Settings(), vocabulary=vocabulary("microworld"))
    found, rest = parse_caption(text)
    assert rest == [], example_id
    asked = [f"Is there a {m.color} {m.name} at the {m.position}?" for m in found]
    return [q for q in asked if judge.answer(facts, q).verdict is False]


def test_chosen_is_true_and_rejected_is_what_the_model_said():
    builder, pairs, skips = run()
    assert len(pairs) > 20 and len(pairs) + len(skips) == SCENES
    by_id = {s.id: s for s in skips}
    for number in range(SCENES):
        record = f"microworld-pairs-{number}"
        pair = next((p for p in pairs if p.origin["example"] == record), None)
        if pair is None:
            # An answer without hallucination makes no pair, and that is expected.
            facts = world.example("pairs", number).facts
            assert by_id[record].reason in builder.expected
            if by_id[record].reason == "nothing wrong in the description":
                assert false_statements(record, facts, by_id[record].detail) == []
            continue
        assert pair.id == f"rlhf_v-{record}-0" and pair.origin["how"] == "rule"
        assert false_statements(record, pair.facts, pair.chosen) == []
        assert false_statements(record, pair.facts, pair.rejected) != []


def test_only_wrong_statements_are_touched():
    _, pairs, _ = run()
    for pair in pairs:
        true = {(o.position, o.color, o.name) for o in scene_of(pair.origin["example"]).objects}
        said = {(m.position, m.color, m.name) for m in parse_caption(pair.rejected)[0]}
        kept = {(m.position, m.color, m.name) for m in parse_caption(pair.chosen)[0]}
        assert said & true <= kept, "what was right is still said"


def test_segments_cover_exactly_the_differences():
    _, pairs, _ = run(one_sided=True, min_match=1)
    for pair in pairs:
        ours, theirs = pair.chosen, pair.rejected
        rest = outside(ours, pair.segments, "chosen")
        assert rest == outside(theirs, pair.segments, "rejected")
        covered = [ours[s.start : s.end] for s in pair.segments if s.side == "chosen"]
        covered += [theirs[s.start : s.end] for s in pair.segments if s.side == "rejected"]
        # Longer by a word on either side, the common rest could not be all that is common.
        assert sum(map(len, map(words, covered))) == len(words(ours)) + len(
            words(theirs)
        ) - 2 * len(rest)
        assert len(rest) > 0


def test_one_sided_words_have_no_segment_by_default():
    _, every, _ = run(one_sided=True)
    builder, pairs, _ = run()
    marked = [sum(len(p.segments) for p in found) for found in (pairs, every)]
    assert marked[0] < marked[1]
    for pair in pairs:
        sides = [s.side for s in pair.segments]
        assert sides.count("chosen") == sides.count("rejected")
    report = builder.report(builder.seen)
    assert report["seen"]["pairs"] == len(pairs)
    assert report["seen"]["pairs_without_segments"] == sum(not p.segments for p in pairs)


def test_a_correction_that_rewrites_is_left_out():
    _, pairs, _ = run()
    changed = sorted(p.origin["words_changed"] / len(words(p.rejected)) for p in pairs)
    bound = changed[len(changed) // 2]
    builder, fewer, skips = run(max_changed=bound)
    left_out = [s for s in skips if s.reason == "the correction rewrites more than it mends"]
    assert len(fewer) + len(left_out) == len(pairs) and left_out
    assert {s.reason for s in left_out} <= builder.expected


def test_a_writer_that_knows_the_truth_makes_the_same_pairs():
    _, by_rule, _ = run()
    writer = Oracle()
    _, by_writer, _ = run(writer)
    assert [(p.id, p.chosen, p.rejected, p.segments) for p in by_rule] == [
        (p.id, p.chosen, p.rejected, p.segments) for p in by_writer
    ]
    assert {(p.origin["how"], p.origin["writer"]) for p in by_writer} == {("model", "oracle")}
    # A round goes out for a whole chunk at once: split, check, correct, split, check.
    assert len(writer.calls) == 5 * -(-SCENES // 32)


def test_a_writer_that_mends_nothing_makes_no_pair():
    def spoil(kind, task):
        return (
            '{"corrected": "In this kitchen, top left is a red pot."}'
            if kind == "correct"
            else None
        )

    _, pairs, skips = run(Oracle(spoil))
    assert pairs == [] or all(false_statements(p.id, p.facts, p.chosen) == [] for p in pairs), (
        "the correction is checked again"
    )
    assert any(s.reason == "the corrected description is still wrong" for s in skips)


def test_chunks_do_not_matter():
    small, large = run(chunk=7)[1], run(chunk=64)[1]
    assert [p.id for p in small] == [p.id for p in large]
    assert [(p.chosen, p.segments) for p in small] == [(p.chosen, p.segments) for p in large]
