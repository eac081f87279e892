"""Runs the probes while training: before the first step, every N steps, and after the last.

A pass is apart from the training step (``mlalign.probes._pass``), so weights are the same with
probes on and off. The rare tier runs in the first pass, the last, and those at checkpoints. A probe
that raises is named, written down with its traceback and left out from then on; training goes on,
and the run ends with a status of its own. Every process calls the callback, the main one writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from mlalign import methods
from mlalign.models._vlm import VLM
from mlalign.objects import vocabulary
from mlalign.probes import _records
from mlalign.probes._pass import ProbeError, ProbePass
from mlalign.probes._probe import Probe, ProbeReading, means
from mlalign.probes._undisturbed import hand_back_memory
from mlalign.recipe import Recipe, configure
from mlalign.runlog import PROBES, RunLog
from mlalign.train.cadence import Cadence, from_main, now

PROBE_SET = "probe_set"
"""Folder of a run that holds its probe records."""


class ProbeCallback(TrainerCallback):
    """Runs a ProbePass at its steps and logs what it read."""

    def __init__(
        self,
        probes: ProbePass,
        cadence: Cadence,
        log: RunLog,
        arm: str,
        *,
        rare: bool = True,
        save_every: int = 0,
    ) -> None:
        """``rare``: whether the rare tier runs at all; ``save_every``: steps between checkpoints,
        0 for none."""
        self.probes = probes
        self.cadence = cadence
        self.log = log
        self.arm = arm
        self.rare = rare
        self.save_every = save_every
        self.reference: Any = None
        """Frozen copy of the model, where no adapter can be switched off."""
        self.passes = 0
        """Passes run so far."""
        self.last_step = -1
        """Step of the last pass."""
        self.failed: dict[str, dict[str, Any]] = {}
        """Probe name -> step, error and traceback file of what disabled it."""
        self._noted = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first pass; a resumed run has it already, and takes up what it left."""
        if state.global_step == 0:
            self._keep_facts()
            self.run(0, rare=self.rare)
        else:
            self._resume(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A pass where one is due; that of the last step runs once training has ended."""
        step = state.global_step
        self.cadence.tick()
        if not self.cadence.is_due(step) or step == state.max_steps:
            return
        rare = self.rare and bool(self.save_every) and step % self.save_every == 0
        if not self.cadence.times_a_pass():
            self.run(step, rare=rare)
            return
        start = now()
        self.run(step, rare=False)
        self.cadence.decide(step, now() - start)
        self._keep_facts()
        self.log.event(self.arm, "probe cadence", **self.cadence.facts())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last pass, unless this step had one."""
        if state.global_step != self.last_step:
            self.run(state.global_step, rare=self.rare)

    def run(self, step: int, *, rare: bool) -> list[ProbeReading]:
        """One pass, logged: readings by record, tables, and means among the metrics.

        Raises ProbeError where the pass is strict and a probe raised.
        """
        start = now()
        hand_back_memory()
        try:
            readings = self.probes.run(step, rare=rare)
        except ProbeError as error:
            self._report(step, error.failed)
            raise
        self.passes += 1
        self.last_step = step
        kept = self.probes.remembered()
        self._report(step, self.probes.failed)
        if self.log.enabled:
            write_pass(self.probes, readings, self.log, self.arm, step, start)
            self._remember(step, kept)
        hand_back_memory()
        return readings

    def _remember(self, step: int, kept: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Keep what the next pass needs, and of older passes what a checkpoint may ask for."""
        if not kept:
            return
        self.log.remember(self.arm, step, flat(kept))
        steps = self.log.remembered_steps(self.arm)
        wanted = set(steps[-2:])
        for folder in (self.log.folder / self.arm / "checkpoints").glob("checkpoint-*"):
            saved = int(folder.name.rpartition("-")[2])
            # To go on from it, and to read it again as it was read then.
            wanted |= {max((s for s in steps if s <= saved), default=-1)}
            wanted |= {max((s for s in steps if s < saved), default=-1)}
        self.log.forget(self.arm, set(steps) - wanted)

    def _resume(self, step: int) -> None:
        """Cadence, disabled probes, and what probes carry on, as they were at ``step``."""
        found: tuple[dict[str, Any], Any] = ({}, {})
        if self.log.enabled:
            before = [s for s in self.log.remembered_steps(self.arm) if s <= step]
            arrays = self.log.remembered(self.arm, before[-1]) if before else {}
            found = (self.log.manifest(PROBES, self.arm), arrays)
        facts, arrays = from_main(found)
        self.cadence.resume(facts, self.arm)
        # A strict run stopped at its fault, which is mended where the run goes on.
        if not self.probes.strict:
            self.failed = dict(facts.get("failed", {}))
            self.probes.failed |= {name: each["error"] for name, each in self.failed.items()}
        self._keep_facts()
        if self.reference is not None:
            # Without an adapter the base is what the model was at step 0: the frozen copy.
            model, self.probes.vlm.model = self.probes.vlm.model, self.reference
            self.probes.run(0, rare=self.rare)
            self.probes.vlm.model = model
        self.probes.recall(nested(arrays))

    def _keep_facts(self) -> None:
        """Cadence and disabled probes, in the manifest."""
        facts = {**self.cadence.facts(), **({"failed": self.failed} if self.failed else {})}
        self.log.add_to_manifest(PROBES, self.arm, facts)

    def _report(self, step: int, failed: Mapping[str, str]) -> None:
        new = {name: text for name, text in failed.items() if name not in self.failed}
        for name, text in new.items():
            last = text.strip().splitlines()[-1]
            file = self.log.traceback(self.arm, name, text)
            self.failed[name] = {"step": step, "error": last, "traceback": str(file)}
            self.log.event(self.arm, "probe disabled", probe=name, step=step, error=text)
            if self.log.enabled:
                print(f"{self.arm}: probe {name} failed and is left out: {last}", flush=True)
        if new:
            self._keep_facts()
        for note in self.probes.notes[self._noted :]:
            self.log.event(self.arm, "probe note", step=step, note=note)
            if self.log.enabled:
                print(f"{self.arm}: {note}", flush=True)
        self._noted = len(self.probes.notes)


def write_pass(
    probes: ProbePass,
    readings: Sequence[ProbeReading],
    log: RunLog,
    arm: str,
    step: int,
    start: float,
) -> None:
    """A pass into the run folder: readings, tables, and means and seconds among the metrics."""
    for probe in probes.methods:
        of_probe = [reading for reading in readings if reading.probe == probe.name]
        log.probe(arm, step, probe.name, of_probe)
    for name, rows in probes.tables.items():
        log.probe(arm, step, name, rows)
    scalars = means(probes.methods, readings)
    log.metrics(arm, step, {**scalars, "probe/seconds": now() - start})


def from_recipe(recipe: Recipe, arm: str, run: Path, vlm: VLM, log: RunLog) -> ProbeCallback:
    """The callback of a recipe's probes section, over the probe set that lies in the run folder.

    Raises ValueError where there is no probe set.
    """
    folder = run / PROBE_SET
    if not (folder / "records.jsonl").is_file():
        raise ValueError(
            f"{folder}: no probe set, but the recipe's probes.methods asks for probes. Build the "
            "run first, or take probes out of the recipe"
        )
    section = recipe.probes
    return ProbeCallback(
        pass_of(recipe, vlm, folder, progress=log.enabled),
        Cadence(every=section.every, share=section.share),
        log,
        arm,
        rare=section.rare,
        save_every=recipe.train.save_every,
    )


def pass_of(recipe: Recipe, vlm: VLM, probe_set: Path, *, progress: bool) -> ProbePass:
    """The pass of a recipe's probes section over the records of a probe set's folder."""
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    section = recipe.probes
    return ProbePass(
        vlm,
        _records.load(probe_set)[: section.records],
        build(section.methods),
        vocabulary(recipe.data.vocabulary),
        section.batch_size,
        rank=torch.distributed.get_rank() if parallel else 0,
        world=torch.distributed.get_world_size() if parallel else 1,
        strict=section.strict,
        progress=progress,
    )


def build(refs: Sequence[Any]) -> list[Probe]:
    """The probes that a recipe names, with their settings."""
    made = []
    for ref in refs:
        method = methods.find("mlalign.probes", ref.name)
        made.append(method(configure(method, ref, "probes.methods")))
    return made


def flat(kept: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Probe -> name -> array, as "probe/name" -> array."""
    return {f"{probe}/{k}": v for probe, arrays in kept.items() for k, v in arrays.items()}


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """``flat`` undone."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in arrays.items():
        probe, _, key = name.partition("/")
        found.setdefault(probe, {})[key] = value
    return found


__all__ = ["ProbeCallback", "build", "flat", "from_recipe", "nested", "pass_of", "write_pass"]
