"""Spans, the cap on unequal counts, length balance."""

import random

import pytest

from data_builders._balance import best_ratio, keeps
from data_builders._pairs import CHOSEN_MENTIONS, REJECTED_MENTIONS, EqualCounts, differing_spans
from mlalign.records import ImageRef, Preference, Skip


def pair(number: int, chosen: int, rejected: int) -> Preference:
    return Preference(
        id=str(number), image=ImageRef(path="x"), image_sha256="", prompt="?", chosen="a b",
        rejected="a c", scores={CHOSEN_MENTIONS: float(chosen), REJECTED_MENTIONS: float(rejected)},
    )  # fmt: skip


def test_differing_spans():
    chosen, rejected = "A red dog runs.", "A blue cat and dog runs."
    texts = [
        (s.side, (chosen if s.side == "chosen" else rejected)[s.start : s.end])
        for s in differing_spans(chosen, rejected, "edit")
    ]
    assert texts == [("chosen", "red"), ("rejected", "blue cat and")]
    assert differing_spans("A dog.", "A dog.", "edit") == ()


def test_equal_counts_hold_the_share_and_count_the_rest():
    rng = random.Random(0)
    pairs = [pair(number, 3, 3 if rng.random() < 0.6 else 4) for number in range(300)]
    told = list(map(EqualCounts(0.8, pairs).admit, pairs))
    assert [t.id for t in told] == [p.id for p in pairs]
    out = [t for t in told if isinstance(t, Preference)]
    equal = sum(p.scores[CHOSEN_MENTIONS] == p.scores[REJECTED_MENTIONS] for p in out)
    assert equal / len(out) >= 0.8 > equal / (len(out) + 1), "as many as the share allows"
    skipped = [t for t in told if isinstance(t, Skip)]
    assert {(s.reason, s.detail) for s in skipped} == {("mention counts differ", "3 against 4")}
    assert min(int(s.id) for s in skipped) > max(
        int(p.id) for p in out if p.scores[REJECTED_MENTIONS] == 4
    ), "the first ones have the room"


@pytest.mark.parametrize(("share", "passing"), [(0.0, 4), (0.5, 4), (1.0, 2)])
def test_equal_counts_at_the_ends(share, passing):
    pairs = [pair(0, 1, 2), pair(1, 2, 2), pair(2, 3, 2), pair(3, 4, 4)]
    told = list(map(EqualCounts(share, pairs).admit, pairs))
    assert sum(isinstance(t, Preference) for t in told) == passing


@pytest.mark.parametrize("seed", range(5))
def test_best_ratio_against_brute_force(seed):
    rng = random.Random(seed)
    lengths = [(rng.randint(5, 20), rng.randint(8, 30)) for _ in range(60)]

    def gap(ratio):
        kept = [c - r for c, r in lengths if (r - c) / r <= ratio + 1e-9]
        return abs(sum(kept) / len(kept)) if kept else float("inf")

    tried = [step / 50 for step in range(51)]
    smallest = min(map(gap, tried))
    assert gap(best_ratio(lengths)) == pytest.approx(smallest)
    assert best_ratio(lengths) == max(r for r in tried if gap(r) <= smallest + 1e-9)


def test_balance_of_nothing_and_of_equal_lengths():
    assert best_ratio([]) == 1.0
    assert best_ratio([(4, 4), (9, 9)]) == 1.0
    assert keeps(5, 5, 0.0) and not keeps(4, 5, 0.1)
