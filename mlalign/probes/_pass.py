"""One pass of all probes over the fixed probe set: forwards shared, everything put back after it.

For each batch of records (rows of one prefix with own, chosen and rejected answer):

    base      adapter off: with the image, blank, swapped     kept from the first pass on, where
              nothing large is needed; without an adapter, always kept from step 0
    adapted   the model as it is: with the image, blank, swapped
    repeat    first batch only: the adapted model again, rows in reverse order and with a longer
              padded tail. Same model, same records, other batch: what differs is the noise floor

The pass is apart from training: eval mode, no gradient (so no checkpointing), and random states,
modes, ``requires_grad`` and the attention function are as before afterwards. Every rank runs the
same number of forwards (ZeRO-3 gathers weights inside them); records are sharded over ranks, and
statistics come from what was gathered from all.
"""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mlalign.branching.attention import capture_rows, refuse, using
from mlalign.branching.batch import PADDING, PrefixBatch, ProbeReading
from mlalign.branching.logps import completion_logps
from mlalign.capture import capture
from mlalign.images import open_image
from mlalign.models._vlm import VLM
from mlalign.probes._probe import ATTENTION, BLANK, HIDDEN, SWAPPED, Item, Probe, ProbeBatch, Watch
from mlalign.probes._records import COMPLETIONS, FindsObjects, ProbeRecord, mentions

LONGER_TAIL = 8
"""Padded tokens added for the repeated forward."""

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
        """``strict``: a probe that raises ends the pass; else it is left out and in ``failed``.
        ``progress``: show a bar over the batches.

        Raises ValueError for an empty probe set, or one whose images are all the same.
        """
        if not records:
            raise ValueError("a probe pass needs at least one record: write a probe set")
        self.vlm = vlm
        self.methods = list(methods)
        self.strict = strict
        self.progress = progress
        self.failed: dict[str, str] = {}
        """Probe name -> traceback of what disabled it."""
        self.tables: dict[str, list[dict[str, Any]]] = {}
        """Further tables of the last pass, by file name."""
        self._base: dict[int, Watches] = {}
        share = -(-len(records) // world)
        numbers = range(rank * share, (rank + 1) * share)
        # Ranks with fewer records repeat the last one, so that all run the same forwards.
        items = [_item(vlm, records, min(i, len(records) - 1), vocabulary) for i in numbers]
        self._real = sum(i < len(records) for i in numbers)
        self._batches = [
            _batch(vlm, items[i : i + batch_size]) for i in range(0, len(items), batch_size)
        ]
        for probe in self.methods:
            probe.prepare(vlm)

    @property
    def active(self) -> list[Probe]:
        """The probes that have not failed."""
        return [probe for probe in self.methods if probe.name not in self.failed]

    def run(self, step: int) -> list[ProbeReading]:
        """All readings at ``step``, the same list on every rank. ``tables`` holds the rest.

        Raises ProbeError where ``strict`` and a probe raised on any rank.
        """
        if not _has_adapter(self.vlm) and not self._base and step > 0:
            raise ValueError(
                f"the first probe pass is at step {step} of a model without an adapter: its base "
                "is what it was at step 0. Start the run anew, or train an adapter"
            )
        with _undisturbed(self.vlm), contextlib.ExitStack() as stack:
            # Whatever the probes, where the model allows it: the numbers of one do not depend on
            # which others run beside it.
            if any(ATTENTION in probe.needs for probe in self.active) or _allowed(self.vlm):
                stack.enter_context(using(self.vlm.core))
            local = self._local()
        ranks = _gather(local)
        for name, text in (pair for each in ranks for pair in each["failed"].items()):
            self.failed.setdefault(name, text)
        self.tables = {}
        readings: list[ProbeReading] = []
        for probe in self.active:
            values, noise = (
                [each[key][probe.name] for each in ranks] for key in ("values", "noise")
            )
            weights = local["weights"][probe.name]
            made = self._guard(probe, lambda p, *a: p.readings(*a), step, values, noise, weights)
            if made is not None:
                readings += made
                self.tables.update(probe.tables())
        if self.failed and self.strict:
            raise ProbeError(self.failed)
        return readings

    def _local(self) -> dict[str, dict[str, Any]]:
        """This rank's share: for each probe its condensed values, noise and weights."""
        # Fixed for the whole pass: a probe that fails on one rank must not change the forwards
        # that this rank runs.
        running = self.active
        values: dict[str, list[Any]] = {probe.name: [] for probe in running}
        noise: dict[str, list[Any]] = {probe.name: [] for probe in running}
        shown = tqdm(self._batches, desc="probes", leave=False, disable=not self.progress)
        for number, batch in enumerate(shown):
            base = self._base_watches(number, batch, running)
            adapted = self._watches(batch, running)
            self._compare(batch, base, adapted, values)
            if number == 0:
                again = _rearranged(self.vlm, batch)
                self._compare(batch, adapted, self._watches(again, running), noise)
        out: dict[str, dict[str, Any]] = {"values": {}, "noise": {}, "weights": {}}
        for probe in running:
            # Read although the probe may have failed: other ranks may be gathering the weights.
            out["weights"][probe.name] = probe.weights(self.vlm)
            kept = values[probe.name][: self._real]
            for key, each in (("values", kept), ("noise", noise[probe.name])):
                out[key][probe.name] = self._guard(probe, lambda p, v: p.condense(v), each)
        out["failed"] = dict(self.failed)
        return out

    def _base_watches(self, number: int, batch: ProbeBatch, running: Sequence[Probe]) -> Watches:
        """The base side: from memory where it was kept, else by forwards with the adapter off."""
        first = number not in self._base
        adapter = _has_adapter(self.vlm)
        # Activations of every token are large: with an adapter, the base gives them again.
        again = [probe for probe in running if adapter and HIDDEN in probe.needs]
        fresh: Watches = {}
        if first or again:
            with self.vlm.adapter_off():
                fresh = self._watches(batch, running if first else again)
        if first:
            large = {probe.name for probe in again}
            self._base[number] = {n: watch for n, watch in fresh.items() if n not in large}
        return {**self._base[number], **fresh}

    def _watches(self, batch: ProbeBatch, probes: Sequence[Probe]) -> Watches:
        """Fresh watches of ``probes`` after the forwards that they need."""
        watches = {
            probe.name: made
            for probe in probes
            if (made := self._guard(probe, lambda p: p.watch(self.vlm, batch))) is not None
        }
        for view in ("image", BLANK, SWAPPED):
            if view == "image" or any(view in probe.needs for probe in probes):
                self._forward(batch, view, probes, watches)
        return watches

    def _forward(
        self, batch: ProbeBatch, view: str, probes: Sequence[Probe], watches: Watches
    ) -> None:
        """One forward of one view, shown to every watch that needs it."""

        def show(need: str, method: str, *values: Any) -> None:
            for probe in probes:
                if need in probe.needs and probe.name in watches:
                    self._guard(probe, lambda p: getattr(watches[p.name], method)(*values))

        def show_hidden(name: str, states_RTD: Tensor) -> None:
            layer, kind = name.split(".")
            show(HIDDEN, "hidden", int(layer), kind, states_RTD)

        rows = self.vlm.encode(_seeing(self.vlm, batch, view))
        wanted = {need for probe in probes for need in probe.needs} if view == "image" else set()
        with contextlib.ExitStack() as stack:
            if ATTENTION in wanted:
                positions = [torch.cat(batch.queries(row)) for row in range(len(batch.items))]
                sink = lambda *values: show(ATTENTION, "attention", *values)  # noqa: E731
                stack.enter_context(capture_rows(self.vlm.layers, positions, sink))
            if HIDDEN in wanted:
                modules, inputs = _mlp_modules(self.vlm)
                stack.enter_context(capture(modules, inputs=inputs, reduce=show_hidden))
            logps = completion_logps(self.vlm.model, rows)
        for probe in probes:
            if probe.name in watches:
                self._guard(probe, lambda p: watches[p.name].logps(view, logps))

    def _compare(
        self, batch: ProbeBatch, before: Watches, after: Watches, into: dict[str, list[Any]]
    ) -> None:
        for probe in self.active:
            if probe.name in before and probe.name in after:
                sides = (before[probe.name], after[probe.name])
                made = self._guard(probe, lambda p, *a: p.compare(*a), batch, *sides)
                into[probe.name] += made or []

    def _guard(self, probe: Probe, call: Callable[..., Any], *values: Any) -> Any:
        """``call(probe, *values)``; an error is written down and disables the probe, on all ranks
        after the next gather. It is not raised here: other ranks wait in the same forwards."""
        if probe.name in self.failed:
            return None
        try:
            return call(probe, *values)
        except Exception:
            self.failed[probe.name] = traceback.format_exc()
            return None


def _item(vlm: VLM, records: Sequence[ProbeRecord], index: int, vocabulary: FindsObjects) -> Item:
    record = records[index]
    image = open_image(record.image, record.id)
    prefix, completions = vlm.branch_ids(record.prompt, record.texts, image.size, record.id)
    own = record.image.sha256()
    later = [*records[index + 1 :], *records[:index]]
    other = next((r for r in later if r.image.sha256() != own), None)
    if other is None:
        raise ValueError("the probe set needs two different images: one is swapped for another")
    boxes: dict[str, Tensor] = {}
    for fact in record.facts.objects:
        if fact.box is not None:
            # A family whose image tokens have no grid has no boxes; the other probes run.
            with contextlib.suppress(NotImplementedError):
                mask = vlm.patch_mask(fact.box, image.size)
                if mask.any():
                    boxes[fact.name] = boxes.get(fact.name, torch.zeros_like(mask)) | mask
    return Item(
        index=index,
        record=record,
        prefix=prefix,
        completions=completions,
        image=vlm.image(image),
        swapped=vlm.image(_in_place_of(vlm, open_image(other.image, other.id), image)),
        mentions=tuple(
            tuple(mentions(text, record.facts, vocabulary, vlm.tokenizer, ids, record.id))
            for text, ids in zip(record.texts, completions, strict=True)
        ),
        boxes=boxes,
    )


def _batch(vlm: VLM, items: list[Item], longer: int = 0) -> ProbeBatch:
    rows = vlm.rows(
        [item.prefix for item in items],
        [item.completions for item in items],
        [item.image for item in items],
        ids=[[item.record.id] * len(COMPLETIONS) for item in items],
        sides=[list(COMPLETIONS)] * len(items),
    )
    if longer:
        rows = _padded(rows, longer, vlm.pad_id)
    image_RT = (rows.input_ids_RT == vlm.image_token_id) & (rows.segment_RT != PADDING)
    return ProbeBatch(items=items, rows=rows.to(vlm.device), image_RT=image_RT)


def _rearranged(vlm: VLM, batch: ProbeBatch) -> ProbeBatch:
    """The same items in reverse order, with a longer padded tail."""
    return _batch(vlm, batch.items[::-1], LONGER_TAIL)


def _padded(rows: PrefixBatch, by: int, pad_id: int) -> PrefixBatch:
    def longer(value_RT: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(value_RT, (0, by), value=fill)

    return replace(
        rows,
        input_ids_RT=longer(rows.input_ids_RT, pad_id),
        position_ids=longer(rows.position_ids, 0),
        segment_RT=longer(rows.segment_RT, PADDING),
        group_RT=longer(rows.group_RT, PADDING),
        place_RT=longer(rows.place_RT, 0),
        block_RT=None if rows.block_RT is None else longer(rows.block_RT, -1),
    )


def _seeing(vlm: VLM, batch: ProbeBatch, view: str) -> PrefixBatch:
    """The rows with the images of a view."""
    if view == "image":
        return batch.rows
    images = [vlm.blank(i.image) if view == BLANK else i.swapped for i in batch.items]
    order = tuple(range(len(images)))
    return replace(batch.rows, images=vlm.family.collate(images), image_G=order)


def _in_place_of(vlm: VLM, other: Image.Image, image: Image.Image) -> Image.Image:
    """The other image, resized where the family would give it another number of tokens."""
    texts = {vlm.family.image_text(vlm.processor, each.size) for each in (other, image)}
    return other if len(texts) == 1 else other.resize(image.size)


def _mlp_modules(vlm: VLM) -> tuple[dict[str, torch.nn.Module], set[str]]:
    """The modules whose activations HIDDEN means, and which of them give their input."""
    modules: dict[str, torch.nn.Module] = {}
    for number, layer in enumerate(vlm.layers):
        block: Any = layer
        modules[f"{number}.gate"] = block.mlp.gate_proj
        modules[f"{number}.coefficient"] = block.mlp.down_proj
        modules[f"{number}.residual"] = layer
    return modules, {name for name in modules if name.endswith("coefficient")}


def _allowed(vlm: VLM) -> bool:
    """Whether the project's attention function serves this model."""
    try:
        refuse(vlm.core)
    except ValueError:
        return False
    return True


def _has_adapter(vlm: VLM) -> bool:
    return hasattr(vlm.model, "peft_config")


@contextlib.contextmanager
def _undisturbed(vlm: VLM) -> Iterator[None]:
    """Eval mode without gradients; modes, requires_grad and random states come back afterwards."""
    modes = [(module, module.training) for module in vlm.model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in vlm.model.parameters()]
    states = random.getstate(), np.random.get_state()
    devices = [vlm.device] if vlm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            vlm.model.eval()
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, wanted in grads:
                if parameter.requires_grad != wanted:
                    parameter.requires_grad_(wanted)
            random.setstate(states[0])
            np.random.set_state(states[1])


def _gather(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, value)
    return ranks
