"""Spans on tokens: every character's token, borders inside a token, blanks and the end of turn."""

from __future__ import annotations

import random

import pytest
import torch

from mlalign.credit.spans import lay_spans

DOG = [(0, 1), (2, 5), (5, 6), (6, 6)]
"""a | dog | . | end of turn"""


def lay(spans, offsets, width=None):
    return lay_spans([spans], [offsets], width or len(offsets))


def test_a_span_is_on_the_tokens_that_spell_it():
    out = lay([(2, 5, -1.5, "x")], DOG, width=6)
    assert out.score_RT.tolist() == [[0, -1.5, 0, 0, 0, 0]]
    assert (out.score_J.tolist(), out.row_J.tolist(), out.last_J.tolist()) == ([-1.5], [0], [1])


def test_a_span_to_the_end_of_the_text_holds_the_end_of_turn():
    assert lay([(0, 6, 2.0, "x")], DOG).score_RT.tolist() == [[2, 2, 2, 2]]
    assert lay([(0, 6, 2.0, "x")], DOG).last_J.tolist() == [3]
    assert lay([(5, 6, 2.0, "x")], DOG).score_RT.tolist() == [[0, 0, 2, 2]]
    # The same without an end of turn: the answer was cut.
    assert lay([(0, 6, 2.0, "x")], DOG[:3]).last_J.tolist() == [2]


def test_blanks_inside_a_span_are_of_it_and_those_between_are_not():
    offsets = [(0, 1), (1, 1), (2, 5), (5, 5), (6, 9)]
    out = lay([(0, 5, 1.0, "x"), (6, 9, 3.0, "x")], offsets)
    assert out.score_RT.tolist() == [[1, 1, 1, 0, 3]]


def test_a_token_on_a_border_is_of_the_span_that_it_shares_more_with():
    offsets = [(0, 2), (2, 5), (5, 7)]
    out = lay([(0, 3, 1.0, "x"), (3, 7, 10.0, "x")], offsets)
    assert out.score_RT.tolist() == [[1, 10, 10]]
    # But either span ends where its last character is spelt.
    assert out.last_J.tolist() == [1, 2]
    even = lay([(0, 3, 1.0, "x"), (3, 4, 10.0, "x")], [(0, 2), (2, 4)])
    assert even.score_RT.tolist() == [[1, 1]]


def test_byte_pieces_of_one_character_are_all_in():
    out = lay([(1, 2, 1.0, "x")], [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)])
    assert out.score_RT.tolist() == [[0, 1, 1, 1, 0]]
    assert out.last_J.tolist() == [3]


def test_spans_of_different_terms_add_up():
    out = lay([(0, 6, 1.0, "x"), (2, 5, -3.0, "y")], DOG)
    assert out.score_RT.tolist() == [[1, -2, 1, 1]]
    assert sorted(out.score_J.tolist()) == [-3, 1]


def test_nothing_on_nothing():
    out = lay_spans([[], []], [[(0, 0)], DOG], 4)
    assert out.score_RT.sum() == 0
    assert (out.score_J.shape, out.row_J.dtype) == ((0,), torch.int64)


def test_a_span_without_a_token_is_refused():
    with pytest.raises(ValueError, match="row 1: no token spells span 1:2 of claims"):
        lay_spans([[], [(1, 2, 1.0, "claims")]], [DOG, DOG], 4)
    with pytest.raises(ValueError, match="no token spells span 9:12"):
        lay([(9, 12, 1.0, "x")], DOG)


def test_agrees_with_a_search_over_characters():
    rng = random.Random(1)
    for _ in range(200):
        size = rng.randint(1, 20)
        cuts = sorted(rng.sample(range(size + 1), rng.randint(1, min(size, 6))))
        offsets = [(a, b) for a, b in zip([0, *cuts], [*cuts, size], strict=True) if a < b]
        ends = sorted(rng.sample(range(size + 1), 2))
        out = lay([(*ends, 1.0, "x")], offsets)
        inside = [bool({*range(a, b)} & {*range(*ends)}) for a, b in offsets]
        assert (out.score_RT[0] > 0).tolist() == inside
        assert out.last_J.item() == max(i for i, own in enumerate(inside) if own)
