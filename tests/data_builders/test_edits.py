"""The edit finder: what is outside the segments is the same on both sides, and its stated rule."""

import difflib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders.edits import edit_blocks, edit_segments, words

VOCABULARY = ("a", "red", "dog", "sits", "near", ",", "two")
sentences = st.lists(st.sampled_from(VOCABULARY), max_size=14).map(" ".join)


def outside(text, segments, side):
    """The words of a side that no segment covers, in order."""
    spans = sorted((s.start, s.end) for s in segments if s.side == side)
    kept, at = [], 0
    for start, end in spans:
        kept.append(text[at:start])
        at = end
    return words(" ".join([*kept, text[at:]]))


def marked(chosen, rejected, **how):
    texts = {"chosen": chosen, "rejected": rejected}
    return [
        (s.side, texts[s.side][s.start : s.end]) for s in edit_segments(chosen, rejected, **how)
    ]


@settings(max_examples=200, deadline=None)
@given(sentences, sentences, st.integers(1, 4))
def test_outside_is_equal_on_both_sides(chosen, rejected, min_match):
    found = edit_segments(chosen, rejected, min_match=min_match, one_sided=True)
    assert outside(chosen, found, "chosen") == outside(rejected, found, "rejected")
    for segment in found:
        text = chosen if segment.side == "chosen" else rejected
        covered = text[segment.start : segment.end]
        assert covered and covered == covered.strip()
        assert (segment.label, segment.weight) == ("edit", 1.0)


@settings(max_examples=200, deadline=None)
@given(sentences, sentences, st.integers(1, 4))
def test_blocks_against_a_walk_over_single_words(chosen, rejected, min_match):
    """The same blocks from difflib's matching by brute force: a word is unchanged where it is
    matched, and stands in no short run of matched words that has a change on both its sides."""
    ours, theirs = words(chosen), words(rejected)
    partner = {}
    for a, b, size in difflib.SequenceMatcher(None, ours, theirs, False).get_matching_blocks():
        partner.update({a + i: b + i for i in range(size)})
    # Steps through both texts: "=" for a matched word, "-" for one of the chosen side only, "+"
    # for one of the rejected side only.
    steps, b = "", 0
    for a in range(len(ours)):
        if a in partner:
            steps += "+" * (partner[a] - b) + "="
            b = partner[a] + 1
        else:
            steps += "-"
    steps += "+" * (len(theirs) - b)
    changed = [step != "=" for step in steps]
    for start in range(len(steps)):
        end = start
        while end < len(steps) and steps[end] == "=":
            end += 1
        inner = start > 0 and steps[start - 1] != "=" and end < len(steps)
        if inner and 0 < end - start < min_match:
            changed[start:end] = [True] * (end - start)
    expected = [0, 0]
    for step, is_changed in zip(steps, changed, strict=True):
        expected[0] += is_changed and step != "+"
        expected[1] += is_changed and step != "-"
    blocks = edit_blocks(ours, theirs, min_match=min_match)
    sizes = [sum(b[side][1] - b[side][0] for b in blocks) for side in (0, 1)]
    assert sizes == expected
    runs = sum(now and not before for before, now in zip([False, *changed], changed, strict=False))
    assert len(blocks) == runs


@settings(max_examples=200, deadline=None)
@given(sentences, sentences, st.integers(1, 4))
def test_by_default_only_blocks_with_words_on_both_sides(chosen, rejected, min_match):
    every = edit_blocks(words(chosen), words(rejected), min_match=min_match)
    both = [b for b in every if b.chosen[0] < b.chosen[1] and b.rejected[0] < b.rejected[1]]
    found = edit_segments(chosen, rejected, min_match=min_match)
    assert [s.side for s in found] == ["chosen", "rejected"] * len(both)
    covered = " ".join(chosen[s.start : s.end] for s in found if s.side == "chosen")
    ours = words(chosen)
    assert words(covered) == [w for b in both for w in ours[slice(*b.chosen)]]


def test_a_replaced_word_and_a_short_match_between_two():
    chosen = "A red dog sits near two old men on the grass."
    rejected = "A blue dog stands near two old men on the beach."
    # "dog" between two edits is one word, shorter than three: it belongs to them.
    assert marked(chosen, rejected) == [
        ("chosen", "red dog sits"),
        ("rejected", "blue dog stands"),
        ("chosen", "grass"),
        ("rejected", "beach"),
    ]
    assert ("chosen", "red") in marked(chosen, rejected, min_match=1)


def test_short_matches_at_the_ends_stay_unchanged():
    assert marked("A red dog.", "A blue dog.") == [("chosen", "red"), ("rejected", "blue")]


def test_insertion_and_deletion():
    longer, shorter = "A dog and a cat sleep on the bed.", "A dog sleep on the bed."
    assert marked(longer, shorter) == marked(shorter, longer) == []
    assert marked(longer, shorter, one_sided=True) == [("chosen", "and a cat")]
    assert marked(shorter, longer, one_sided=True) == [("rejected", "and a cat")]


def test_neighbouring_insertions_become_a_replacement():
    """Each side has words of its own with two equal ones between: the short match joins them."""
    found = marked("old dog runs now", "dog runs here now")
    assert found == [("chosen", "old dog runs"), ("rejected", "dog runs here")]


def test_popular_words_of_a_long_text_count_as_any_other():
    """difflib drops them from 200 words on unless told not to; then nothing here would match."""
    ours = ["a", "b", "c"] * 100
    theirs = [*ours[:150], "x", *ours[151:]]
    assert marked(" ".join(ours), " ".join(theirs)) == [("chosen", "a"), ("rejected", "x")]


def test_identical_answers_have_no_segment():
    assert edit_segments("A dog.", "A  dog .", one_sided=True) == ()


def test_min_match_below_one_is_refused():
    with pytest.raises(ValueError, match="min_match is 0"):
        edit_segments("a b", "a c", min_match=0)


@settings(max_examples=100, deadline=None)
@given(sentences, sentences, st.integers(1, 4))
def test_a_short_row_is_compared_as_without_what_stands_before(chosen, rejected, min_match):
    """Under 200 units autojunk is off, and what is equal on both sides adds no edit."""
    ours, theirs = words(chosen), words(rejected)
    start = ["describe", "this", "image", "."]
    plain = edit_blocks(ours, theirs, min_match=min_match)
    assert edit_blocks(ours, theirs, min_match=min_match, before=[]) == plain
    found = edit_blocks(ours, theirs, min_match=min_match, before=start)
    assert bool(found) == bool(plain) == (ours != theirs)


def test_a_whole_row_makes_common_words_no_anchor():
    """As in the released code: between two edits stands a run of words that are popular in the row,
    so nothing anchors it there and the edits become one; by words alone they are two."""
    filler = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    popular = ["a", "b", "c", "d"]
    chosen = ["x1", *popular, "y1", *filler, *(popular * 12)]
    rejected = ["x2", *popular, "y2", *filler, *(popular * 12)]
    before = ["<image>"] * 576 + ["describe", "this", "image"]
    apart = edit_blocks(chosen, rejected)
    joined = edit_blocks(chosen, rejected, before=before)
    assert apart == [((0, 1), (0, 1)), ((5, 6), (5, 6))]
    assert joined == [((0, 6), (0, 6))]
    # The same from difflib's own opcodes over the rows.
    matcher = difflib.SequenceMatcher(None, before + chosen, before + rejected)
    changed = [op for op in matcher.get_opcodes() if op[0] != "equal"]
    assert [(a0 - 579, a1 - 579) for _, a0, a1, _, _ in changed] == [(0, 6)]


def test_spans_are_of_the_answers():
    text, other = "a red dog sits near two cats", "a red dog sits near two men"
    found = edit_segments(text, other, before=["<image>"] * 576 + ["describe"])
    assert [(s.side, s.start, s.end) for s in found] == [("chosen", 24, 28), ("rejected", 24, 27)]
