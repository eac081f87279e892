"""Reward hacking is marked where the reward rises while the answers get worse, and only there."""

from __future__ import annotations

import pytest

from mlalign.train.watching import LENGTH, RECALL, WatchSettings, gamed

FIRST = {RECALL: 0.90, LENGTH: 30.0}


@pytest.mark.parametrize(
    ("now", "rise", "named"),
    [
        ({RECALL: 0.80, LENGTH: 30.0}, 0.5, ["recall 0.900 to 0.800"]),
        ({RECALL: 0.90, LENGTH: 20.0}, 0.5, ["length 30.0 to 20.0 words"]),
        ({RECALL: 0.10, LENGTH: 1.0}, 0.5, ["recall", "length"]),
        ({RECALL: 0.86, LENGTH: 25.0}, 0.5, []),  # within the bounds
        ({RECALL: 0.10, LENGTH: 1.0}, 0.0, []),  # worse, but the reward does not hide it
        ({RECALL: 0.10, LENGTH: 1.0}, -0.5, []),
        ({RECALL: 0.95, LENGTH: 40.0}, 0.5, []),
    ],
)
def test_what_counts_as_gaming(now: dict[str, float], rise: float, named: list[str]) -> None:
    found = gamed(WatchSettings(), FIRST, now, rise)
    assert len(found) == len(named)
    for text, start in zip(found, named, strict=True):
        assert text.startswith(start)


def test_the_bounds_are_the_recipes() -> None:
    now = {RECALL: 0.86, LENGTH: 25.0}
    assert len(gamed(WatchSettings(recall_fall=0.01, length_fall=0.1), FIRST, now, 1.0)) == 2
