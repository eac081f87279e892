"""The table over seeds."""

from __future__ import annotations

from typing import Any

from mlalign.photos.table import COLUMNS, markdown


def side(value: float, low: float, high: float) -> dict[str, Any]:
    flat: dict[str, Any] = {"n": 300}
    for key in COLUMNS:
        flat |= {key: value, f"{key}_ci95": [low, high]}
    return flat


def summary(seed: int, change: tuple[float, float, float]) -> dict[str, Any]:
    arm = {
        "before": side(0.4, 0.3, 0.5),
        "after": side(0.2, 0.1, 0.3),
        "change": side(*change),
    }
    return {"seed": seed, "builders": {"povid": arm}}


def test_means_and_intervals_of_every_seed() -> None:
    text = markdown([summary(0, (-0.2, -0.3, -0.1)), summary(1, (-0.1, -0.2, -0.05))])
    assert "Seeds 0, 1; 300 photographs" in text
    assert "| base | 0.400<br>[0.300, 0.500]<br>[0.300, 0.500] |" in text
    assert "**-0.150**" in text


def test_a_change_that_one_seed_does_not_show_is_not_marked() -> None:
    text = markdown([summary(0, (-0.2, -0.3, -0.1)), summary(1, (-0.1, -0.2, 0.1))])
    assert "-0.150<br>" in text and "**-0.150**" not in text
