"""What several ranks gather, without processes: passes over shards, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes import _pass
from mlalign.probes._probe import Probe
from tests.probes import tiny


class _Gathered(Exception):
    """Ends a pass where it would wait for the other ranks."""


def gathered(
    monkeypatch: pytest.MonkeyPatch,
    vlm: VLM,
    new: Callable[[], Probe],
    world: int = 1,
    **keywords: Any,
) -> tuple[list[Any], list[ProbeReading]]:
    """(what every rank's probe condensed, readings of rank 0 from all of them)."""
    seen: list[Any] = []

    def keep(value: Any) -> None:
        seen.append(value)
        raise _Gathered

    for rank in range(world):
        with monkeypatch.context() as patch:
            patch.setattr(_pass, "_gather", keep)
            with pytest.raises(_Gathered):
                tiny.new_pass(vlm, [new()], rank=rank, world=world, **keywords).run(0)
    with monkeypatch.context() as patch:
        patch.setattr(_pass, "_gather", lambda _value: seen)
        made = tiny.new_pass(vlm, [new()], rank=0, world=world, **keywords).run(0)
    return [each["values"][new().name] for each in seen], made


def equal(one: list[ProbeReading], other: list[ProbeReading], abs: float = 1e-4) -> None:
    """The same readings, in order, with the same values and limits."""
    assert one, "nothing was read"
    for a, b in zip(one, other, strict=True):
        where = (a.metric, a.side, a.group, a.layer, a.record, a.n)
        assert where == (b.metric, b.side, b.group, b.layer, b.record, b.n)
        for x, y in ((a.value, b.value), (a.lo, b.lo), (a.hi, b.hi)):
            assert x == pytest.approx(y, abs=abs, rel=1e-3, nan_ok=True), where
