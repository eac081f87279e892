"""Runs the probes while training: before the first step, every N steps, and after the last.

A pass is apart from the training step (``mlalign.probes._pass``), so weights are the same with
probes on and off. A probe that raises is named, written to the run's events and left out from then
on; training goes on. Every process calls the callback, the main one writes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mlalign import methods
from mlalign.models._vlm import VLM
from mlalign.objects import vocabulary
from mlalign.probes import _records
from mlalign.probes._pass import ProbePass
from mlalign.probes._probe import Probe, means
from mlalign.recipe import Recipe
from mlalign.runlog import RunLog

PROBE_SET = "probe_set"
"""Folder of a run that holds its probe records."""


class ProbeCallback(TrainerCallback):
    """Runs a ProbePass at its steps and logs what it read."""

    def __init__(self, probes: ProbePass, every: int, log: RunLog, arm: str) -> None:
        """``every``: steps between passes; 0: only before the first step and after the last."""
        self.probes = probes
        self.every = every
        self.log = log
        self.arm = arm
        self.passes = 0
        """Passes run so far."""
        self.last_step = -1
        """Step of the last pass."""
        self._reported: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first pass; a resumed run has it already."""
        if state.global_step == 0:
            self.run(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A pass where the step is a multiple of ``every``."""
        if self.every and state.global_step % self.every == 0:
            self.run(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last pass, unless this step had one."""
        if state.global_step != self.last_step:
            self.run(state.global_step)

    def run(self, step: int) -> None:
        """One pass, logged: readings by record, tables, and means among the metrics."""
        start = time.monotonic()
        readings = self.probes.run(step)
        self.passes += 1
        self.last_step = step
        self._report_failures()
        if not self.log.enabled:
            return
        for probe in self.probes.methods:
            of_probe = [reading for reading in readings if reading.probe == probe.name]
            self.log.probe(self.arm, step, probe.name, of_probe)
        for name, rows in self.probes.tables.items():
            self.log.probe(self.arm, step, name, rows)
        scalars = means(self.probes.methods, readings)
        self.log.metrics(self.arm, step, {**scalars, "probe/seconds": time.monotonic() - start})

    def _report_failures(self) -> None:
        for name, text in self.probes.failed.items():
            if name not in self._reported:
                self._reported.add(name)
                self.log.event(self.arm, "probe disabled", probe=name, error=text)
                if self.log.enabled:
                    last = text.strip().splitlines()[-1]
                    print(f"{self.arm}: probe {name} failed and is left out: {last}", flush=True)


def from_recipe(
    recipe: Recipe, arm: str, run: Path, vlm: VLM, log: RunLog, *, strict: bool = False
) -> ProbeCallback:
    """The callback of a recipe's probes section, over the probe set that lies in the run folder.

    ``strict``: a probe that raises ends the run. Raises ValueError where there is no probe set.
    """
    folder = run / PROBE_SET
    if not (folder / "records.jsonl").is_file():
        raise ValueError(
            f"{folder}: no probe set, but the recipe's probes.methods asks for probes. Build the "
            "run first, or take probes out of the recipe"
        )
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    probes = ProbePass(
        vlm,
        _records.load(folder)[: recipe.probes.records],
        build(recipe.probes.methods),
        vocabulary(recipe.data.vocabulary),
        recipe.probes.batch_size,
        rank=torch.distributed.get_rank() if parallel else 0,
        world=torch.distributed.get_world_size() if parallel else 1,
        strict=strict,
        progress=log.enabled,
    )
    return ProbeCallback(probes, recipe.probes.every, log, arm)


def build(refs: Sequence[Any]) -> list[Probe]:
    """The probes that a recipe names, with their settings."""
    made = []
    for ref in refs:
        method = methods.find("mlalign.probes", ref.name)
        made.append(method(method.Settings(**ref.settings())))
    return made


__all__ = ["ProbeCallback", "build", "from_recipe"]
