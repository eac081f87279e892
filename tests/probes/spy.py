"""A probe that keeps all that the pass shows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from mlalign.branching.batch import ProbeReading, TokenLogps
from mlalign.models._vlm import VLM
from mlalign.probes._lens import Lens
from mlalign.probes._probe import EVERY, Probe, ProbeBatch, Watch


class Seen(Watch):
    """Everything that was shown, by what it is of."""

    def __init__(self, batch: ProbeBatch) -> None:
        super().__init__(batch)
        self.lens: Lens | None = batch.lens
        self.rows: dict[tuple[str, int, int], Tensor] = {}
        self.states: dict[tuple[int, str], Tensor] = {}
        self.views: dict[str, TokenLogps] = {}
        self.last: dict[str, Tensor] = {}
        self.slopes: dict[int, tuple[Tensor, Tensor]] = {}

    def attention(self, layer: int, row: int, weights_HQT: Tensor) -> None:
        self.rows["response", layer, row] = weights_HQT

    def prompt_attention(self, layer: int, row: int, weights_HQT: Tensor) -> None:
        self.rows["prompt", layer, row] = weights_HQT

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        self.states[layer, kind] = states_RTD.clone()

    def logps(self, view: str, logps: TokenLogps) -> None:
        self.views[view] = logps

    def final(self, view: str, states_CSD: Tensor) -> None:
        self.last[view] = states_CSD

    def gradient(self, completion: int, inputs_RTD: Tensor, gradients_RTD: Tensor) -> None:
        self.slopes[completion] = inputs_RTD, gradients_RTD


class Spy(Probe):
    """Hands every watch to the test: ``watches`` in the order in which they were made."""

    prefix = "probe/spy"
    headline = "adapted"

    def __init__(self, needs: Iterable[str] = (), tier: str = EVERY, name: str = "spy") -> None:
        self.needs = frozenset(needs)
        self.tier = tier
        self.name = name
        self.watches: list[Seen] = []

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        self.watches.append(Seen(batch))
        return self.watches[-1]

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        return [
            float(after.views["image"].logps_CS[0].sum())
            for _ in batch.items
            if isinstance(after, Seen)
        ]

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        fixed: dict[str, Any] = {"step": step, "probe": self.name, "record": ""}
        return [
            ProbeReading(metric=metric, side=side, layer=layer, value=1.0, **fixed)
            for metric in ("count", "mean")
            for side in ("base", "adapted", "delta")
            for layer in (-1, 0, 1, 2)
        ]
