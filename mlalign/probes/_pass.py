"""One pass of all probes over the fixed probe set: forwards shared, everything put back after it.

For each batch of records (rows of one prefix with own, chosen and rejected answer):

    base      adapter off: the image and the views that are needed    kept from the first pass on,
              where nothing large is needed; without an adapter, always kept from step 0. Before
              the first step it is what the adapted model is, and is not run (``_alike.py``)
    adapted   the model as it is: the same
    repeat    the first records again: the adapted model in another batch (``_items.rearranged``).
              What differs between two runs of one model over one record is the noise floor

Two tiers: a rare pass runs all probes, the others those of tier "every", and only the forwards that
these need (``_forwards.py``). The pass is apart from training: eval mode, no gradient (so no
checkpointing), and random states, modes, ``requires_grad`` and the attention function are as before
afterwards. Every rank runs the same number of forwards (ZeRO-3 gathers weights inside them);
records are sharded over ranks, and statistics come from what was gathered from all.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mlalign.branching.attention import refuse, using
from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes import _faults
from mlalign.probes._alike import adds_nothing
from mlalign.probes._faults import SidedFault
from mlalign.probes._forwards import run_forwards
from mlalign.probes._items import make_batch, make_item, rearranged
from mlalign.probes._lens import lens_of
from mlalign.probes._probe import EVERY, HIDDEN, LENS, Probe, ProbeBatch, Watch
from mlalign.probes._records import FindsObjects, ProbeRecord
from mlalign.probes._serves import refuse_unserved
from mlalign.probes._undisturbed import undisturbed

Watches = dict[str, Watch]


class ProbeError(RuntimeError):
    """A probe raised. The message names it; ``failed`` holds the traceback of each."""

    def __init__(self, failed: dict[str, str]) -> None:
        last = {name: text.strip().splitlines()[-1] for name, text in failed.items()}
        super().__init__("; ".join(f"probe {name}: {line}" for name, line in last.items()))
        self.failed = failed


class ProbePass:
    """Probes, their records and the model; ``run`` reads them all once."""

    def __init__(
        self,
        vlm: VLM,
        records: Sequence[ProbeRecord],
        methods: Sequence[Probe],
        vocabulary: FindsObjects,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        strict: bool = True,
        progress: bool = False,
    ) -> None:
        """``strict``: a probe that raises, or that refuses the model, ends the pass; else it is
        left out and in ``failed``. ``progress``: show a bar over the batches.

        Raises ValueError for an empty probe set, and where ``strict`` what a probe refuses with.
        """
        if not records:
            raise ValueError("a probe pass needs at least one record: write a probe set")
        self.vlm = vlm
        self.methods = list(methods)
        self.strict = strict
        self.progress = progress
        self.failed: dict[str, str] = {}
        """Probe name -> traceback of what disabled it."""
        self.notes: list[str] = []
        """What the set or the model does not give, and what that does to readings; each once."""
        self.tables: dict[str, list[dict[str, Any]]] = {}
        """Further tables of the last pass, by file name."""
        self._base: dict[int, Watches] = {}
        self._base_faults: list[SidedFault] = []
        self._raised: dict[str, str] = {}
        """Probe name -> traceback of what it raised in this pass."""
        for probe in self.methods:
            self._prepare(probe)
        share = -(-len(records) // world)
        # A rank with fewer records reads on from the set's beginning. So all run the same forwards
        # over as many rows (ZeRO-3 compares what ranks call), and no batch holds a record twice
        # (watches are kept by record).
        numbers = [i % len(records) for i in range(rank * share, (rank + 1) * share)]
        needs = self._needs(self.active)
        items = [make_item(vlm, records, i, vocabulary, needs) for i in numbers]
        self._real = max(0, min(share, len(records) - rank * share))
        self._batches = [
            make_batch(vlm, items[i : i + batch_size]) for i in range(0, len(items), batch_size)
        ]

    @property
    def active(self) -> list[Probe]:
        """The probes that have not failed."""
        return [probe for probe in self.methods if probe.name not in self.failed]

    def run(self, step: int, rare: bool = True) -> list[ProbeReading]:
        """All readings at ``step``, the same list on every rank. ``tables`` holds the rest.

        ``rare``: the probes of tier "rare" too; the same on every rank. Raises ProbeError where
        ``strict`` and a probe raised on any rank.
        """
        running = [probe for probe in self.active if rare or probe.tier == EVERY]
        self._raised = {}
        self._check_base(step, running)
        with undisturbed(self.vlm), contextlib.ExitStack() as stack:
            # Whatever the probes, where the model allows it: the numbers of one do not depend on
            # which others run beside it. Probes that need it have been refused where it does not.
            if _allowed(self.vlm):
                stack.enter_context(using(self.vlm.core))
            stack.enter_context(self._lens(running))
            local = self._local(running)
        ranks = _gather(local)
        self._note(_faults.of_set([each["has"] for each in ranks], self._needs(running)))
        faults = {probe.name: _faults.concerning(probe, ranks) for probe in running}
        self._settle(running, [each["raised"] for each in ranks], faults)
        self.tables = {}
        readings: list[ProbeReading] = []
        for probe in running:
            values, noise = (
                [each[key][probe.name] for each in ranks] for key in ("values", "noise")
            )
            weights = local["weights"][probe.name]
            made = self._guard(probe, lambda p, *a: p.readings(*a), step, values, noise, weights)
            if made is not None:
                self._note(_faults.said(probe, faults[probe.name]))
                readings += _faults.blanked(made, probe, faults[probe.name])
                self.tables.update(self._guard(probe, lambda p: p.tables()) or {})
        self._settle(running, [self._raised], faults)
        if self.failed and self.strict:
            raise ProbeError(self.failed)
        return readings

    def _settle(
        self,
        running: Sequence[Probe],
        raised: Sequence[dict[str, str]],
        faults: dict[str, list[SidedFault]],
    ) -> None:
        """Disable what raised on any rank; but one that was given what is not finite is only left
        out of this pass, and says so."""
        for each in raised:
            self._raised.update(each)
        for probe in running:
            text = self._raised.get(probe.name)
            if text is None:
                continue
            if faults[probe.name] and _has_adapter(self.vlm):
                last = text.strip().splitlines()[-1]
                self._note(_faults.said(probe, faults[probe.name], f"it raised {last}"))
                # Ranks must agree on whose base is known.
                for kept in self._base.values():
                    kept.pop(probe.name, None)
            else:
                self.failed.setdefault(probe.name, text)

    def remembered(self) -> dict[str, dict[str, np.ndarray]]:
        """What each probe's next pass needs of the last one, by probe; for ``recall``."""
        kept: dict[str, dict[str, np.ndarray]] = {}
        for probe in self.active:
            try:
                kept[probe.name] = probe.remember()
            except Exception as error:
                self._note([f"probe {probe.name}: what it remembers is lost: {error!r}"])
        return {name: each for name, each in kept.items() if each}

    def recall(self, kept: dict[str, dict[str, np.ndarray]]) -> None:
        """Hand back what ``remembered`` gave before the run was resumed."""
        for probe in self.active:
            if probe.name in kept:
                try:
                    probe.recall(kept[probe.name])
                except Exception as error:
                    self._note([f"probe {probe.name}: cannot recall the last pass: {error!r}"])

    def _prepare(self, probe: Probe) -> None:
        """Refuse what cannot be served: raises where strict, else disables the probe."""
        try:
            refuse_unserved(probe, self.vlm)
            probe.prepare(self.vlm)
        except Exception:
            if self.strict:
                raise
            self.failed[probe.name] = traceback.format_exc()

    def _check_base(self, step: int, running: Sequence[Probe]) -> None:
        known = self._base.get(0, {})
        late = [probe.name for probe in running if probe.name not in known]
        if late and step > 0 and not _has_adapter(self.vlm):
            raise ValueError(
                f"the first probe pass of {', '.join(late)} is at step {step} of a model without "
                "an adapter: its base is what it was at step 0. Start the run anew, or train an "
                "adapter"
            )

    def _needs(self, probes: Sequence[Probe]) -> frozenset[str]:
        return frozenset[str]().union(*(probe.needs for probe in probes))

    def _note(self, notes: Sequence[str]) -> None:
        self.notes += [note for note in notes if note not in self.notes]

    @contextlib.contextmanager
    def _lens(self, running: Sequence[Probe]) -> Iterator[None]:
        """The lens on every batch, inside; made here, where no rank can have left the others."""
        lens = lens_of(self.vlm) if LENS in self._needs(running) else None
        try:
            for batch in self._batches:
                batch.lens = lens
            yield
        finally:
            for batch in self._batches:
                batch.lens = None

    def _local(self, running: Sequence[Probe]) -> dict[str, Any]:
        """This rank's share: for each probe its condensed values, noise and weights.

        ``running`` is fixed for the whole pass: a probe that fails on one rank must not change the
        forwards that this rank runs.
        """
        values: dict[str, list[Any]] = {probe.name: [] for probe in running}
        noise: dict[str, list[Any]] = {probe.name: [] for probe in running}
        faults: list[SidedFault] = []
        shown = tqdm(self._batches, desc="probes", leave=False, disable=not self.progress)
        reads: set[str] = set()
        alike = adds_nothing(self.vlm)
        for number, batch in enumerate(shown):
            base, adapted = self._sides(number, batch, running, faults, alike)
            reads |= {name for name, w in adapted.items() if type(w).logps is not Watch.logps}
            self._compare(batch, base, adapted, values)
            if number == 0:
                first, again = rearranged(self.vlm, batch)
                repeat = self._watches(again, running, "adapted", faults)
                self._compare(first, adapted, repeat, noise)
                del repeat
            # Gone before those of the next batch are made.
            del base, adapted
        out: dict[str, Any] = {"values": {}, "noise": {}, "weights": {}, "reads": reads}
        for probe in running:
            # Read although the probe may have failed: other ranks may be gathering the weights.
            out["weights"][probe.name] = self._attempt(probe, lambda p: p.weights(self.vlm))
            kept = values[probe.name][: self._real]
            for key, each in (("values", kept), ("noise", noise[probe.name])):
                out[key][probe.name] = self._guard(probe, lambda p, v: p.condense(v), each)
        items = [item for batch in self._batches for item in batch.items]
        out["has"] = _faults.what_the_set_has(items)
        out["faults"] = sorted({*faults, *self._base_faults})
        out["raised"] = dict(self._raised)
        return out

    def _sides(
        self,
        number: int,
        batch: ProbeBatch,
        running: Sequence[Probe],
        faults: list[SidedFault],
        alike: bool,
    ) -> tuple[Watches, Watches]:
        """Base and adapted. The base comes from memory where it was kept; else by forwards with
        the adapter off, or, where both sides are ``alike``, it is the adapted one."""
        kept = self._base.setdefault(number, {})
        # Activations of every token are large: with an adapter, the base gives them again.
        large = {p.name for p in running if _has_adapter(self.vlm) and HIDDEN in p.needs}
        again = [probe for probe in running if probe.name not in kept]
        fresh: Watches = {}
        if again and not alike:
            with self.vlm.adapter_off():
                fresh = self._watches(batch, again, "base", self._base_faults)
        found: list[SidedFault] = []
        adapted = self._watches(batch, running, "adapted", found)
        faults += found
        if again and alike:
            fresh = {p.name: adapted[p.name] for p in again if p.name in adapted}
            self._base_faults += [fault._replace(side="base") for fault in found]
        kept |= {name: watch for name, watch in fresh.items() if name not in large}
        return {**kept, **fresh}, adapted

    def _watches(
        self, batch: ProbeBatch, probes: Sequence[Probe], side: str, faults: list[SidedFault]
    ) -> Watches:
        """Fresh watches of ``probes`` after the forwards that they need."""
        watches = {
            probe.name: made
            for probe in probes
            if (made := self._guard(probe, lambda p: p.watch(self.vlm, batch))) is not None
        }

        def show(needs: frozenset[str], method: str, *values: Any) -> None:
            for probe in probes:
                if needs <= probe.needs and probe.name in watches:
                    self._guard(probe, lambda p: getattr(watches[p.name], method)(*values))

        found = run_forwards(self.vlm, batch, self._needs(probes), show)
        faults += [SidedFault(side, f.view, f.record, f.layer) for f in found]
        return watches

    def _compare(
        self, batch: ProbeBatch, before: Watches, after: Watches, into: dict[str, list[Any]]
    ) -> None:
        for probe in self.methods:
            if probe.name in before and probe.name in after:
                sides = (before[probe.name], after[probe.name])
                made = self._guard(probe, lambda p, *a: p.compare(*a), batch, *sides)
                into[probe.name] += made or []

    def _guard(self, probe: Probe, call: Callable[..., Any], *values: Any) -> Any:
        """``call(probe, *values)``, but for a probe that has raised."""
        return None if probe.name in self._raised else self._attempt(probe, call, *values)

    def _attempt(self, probe: Probe, call: Callable[..., Any], *values: Any) -> Any:
        """``call(probe, *values)``; an error is written down and disables the probe, on all ranks
        after the next gather. It is not raised here: other ranks wait in the same forwards."""
        try:
            return call(probe, *values)
        except Exception:
            self._raised.setdefault(probe.name, traceback.format_exc())
            return None


def _allowed(vlm: VLM) -> bool:
    """Whether the project's attention function serves this model."""
    try:
        refuse(vlm.core)
    except ValueError:
        return False
    return True


def _has_adapter(vlm: VLM) -> bool:
    return hasattr(vlm.model, "peft_config")


def _gather(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, value)
    return ranks
