"""FLOPs of a probe pass, beside those of the training steps between two passes.

A pass makes rows of one prefix and three answers of every record and runs, for each of its sides,

    a forward for each set of pixels (the image, blank, swapped, noised), with the tower
    a forward for each knock-out of image columns, on the features of the image
    a forward and three backward passes to the input embeddings, where a probe reads the gradient
    2 Q T D more in every block for Q rows of attention that probes read, T tokens, D wide
    2 D V for each state that a probe reads through the head

The base side runs whole in the first pass; afterwards only for probes of activations, which are too
large to keep, and without an adapter not at all. Where the first pass comes before the first step
of a fresh LoRA both sides are one model, and one is run: what is said of it here is its most. The
first ``REPEATED`` records are run once more on the adapted side, for the noise floor. Not counted:
what probes do with what they are shown beside these (sums, statistics), as norms and activations
are not counted of a step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mlalign import methods
from mlalign.estimate.flops import Flops, forward, vision
from mlalign.estimate.geometry import Geometry
from mlalign.estimate.plan import Adapter, adapter_of
from mlalign.estimate.rows import Rows
from mlalign.recipe import Recipe, configure

ANSWERS = 3
"""Completions of a probe row: own, chosen, rejected."""
REPEATED = 4
"""Records that are run once more."""
PIXELS = frozenset({"blank", "swapped", "noised"})
"""Needs that are a forward with other pixels."""
ROW_BACKWARD = 2.0
"""Attention's backward over its forward; the weights are kept."""


class Asks(Protocol):
    """What counts of a probe."""

    name: str
    needs: frozenset[str]
    settings: Any


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one side of a pass runs for one record."""

    images: int = 1
    """Sets of pixels."""
    knockouts: int = 0
    gradient: bool = False
    queries: int = 0
    """Rows of attention that are computed again."""
    states: int = 0
    """States that go through the head beside the answers' own."""


def side_of(probes: Collection[Asks], geometry: Geometry, rows: Rows) -> Side:
    """What the needs of ``probes`` add up to."""
    needs = frozenset[str]().union(*(probe.needs for probe in probes))
    after_image = max(rows.prefix - geometry.image_tokens, 0)
    return Side(
        images=1 + len(needs & PIXELS),
        knockouts=sum(need.startswith("knockout.") for need in needs),
        gradient="gradient" in needs,
        queries=("attention" in needs) * rows.scored + ("prompt_attention" in needs) * after_image,
        states=sum(_lens_states(probe, geometry, rows) for probe in probes),
    )


def side(geometry: Geometry, rows: Rows, asked: Side, adapter: Adapter | None) -> Flops:
    """One record's share of one side."""
    decoder = geometry.decoder
    once = forward(geometry, rows, adapter)
    forwards = asked.images + asked.knockouts + asked.gradient
    total = once * forwards + vision(geometry, rows.tiles) * asked.images
    attended = 2.0 * asked.queries * rows.tokens * decoder.attention_width * decoder.layers
    lens = 2.0 * asked.states * decoder.width * decoder.vocabulary
    total += Flops(attention=attended, head=lens)
    if asked.gradient:
        # Frozen linears pass the gradient on; the head's slope is made in the forward, once.
        back = Flops(
            linear=once.linear, adapter=once.adapter, attention=once.attention * ROW_BACKWARD
        )
        total += back * len(rows.completions) + Flops(head=once.head)
    return total


def one_pass(
    geometry: Geometry,
    rows: Rows,
    probes: Collection[Asks],
    *,
    records: int,
    batch_size: int,
    adapter: Adapter | None,
    first: bool = False,
) -> Flops:
    """A pass of ``probes`` over ``records``, on one process. ``first``: nothing is kept yet."""
    whole = side_of(probes, geometry, rows)
    again = [probe for probe in probes if "hidden" in probe.needs and adapter is not None]
    adapted = side(geometry, rows, whole, adapter)
    total = adapted * (records + min(batch_size, records, REPEATED))
    if first:
        total += side(geometry, rows, whole, None) * records
    elif again:
        total += side(geometry, rows, side_of(again, geometry, rows), None) * records
    return total


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of a recipe's passes."""

    common: float
    """A pass of the tier "every"."""
    rare: float
    """A pass of all probes: the last, and those at checkpoints."""
    first: float
    """The first pass, which reads the base as well, where it is another model than the adapted."""
    every: int | None
    """Steps between passes, 0: only the first and the last; None: by time."""
    step: float
    """A training step."""

    @property
    def between(self) -> float | None:
        """Share of a common pass in the steps between two; None where none runs there, or where
        the number of steps is made out of time."""
        return self.common / (self.every * self.step) if self.every else None

    def steps_for(self, share: float) -> int:
        """Steps between passes at which a common pass is at most ``share`` of them."""
        return math.ceil(self.common / (share * self.step))

    def whole(self, steps: int, save_every: int) -> float | None:
        """Share of all passes of a run of ``steps`` in its steps; None where it is by time."""
        if self.every is None:
            return None
        at = range(self.every, steps, self.every) if self.every else ()
        rare = sum(bool(save_every) and step % save_every == 0 for step in at)
        passes = self.first + self.rare * (rare + 1) + self.common * (len(at) - rare)
        return passes / (steps * self.step)


def cost_of(recipe: Recipe, geometry: Geometry, rows: Rows, step: float) -> Cost | None:
    """What the recipe's probes cost beside a step of ``step`` FLOPs; None where it has none.

    ``rows``: those of a training pair. Raises RecipeError, UnknownMethod.
    """
    section = recipe.probes
    if not section.methods:
        return None
    every: list[Any] = []
    rare: list[Any] = []
    for ref in section.methods:
        method = methods.find("mlalign.probes", ref.name)
        made = method(configure(method, ref, "probes.methods"))
        (every if made.tier == "every" else rare).append(made)
    everything = [*every, *rare] if section.rare else every
    lora = recipe.model.adapter
    fixed: dict[str, Any] = {
        "records": section.records,
        "batch_size": section.batch_size,
        "adapter": None if lora == "none" else adapter_of(lora, geometry.decoder),
    }
    row = rows_of_probes(rows)
    return Cost(
        common=one_pass(geometry, row, every, **fixed).total,
        rare=one_pass(geometry, row, everything, **fixed).total,
        first=one_pass(geometry, row, everything, first=True, **fixed).total,
        every=section.every,
        step=step,
    )


def rows_of_probes(rows: Rows) -> Rows:
    """A probe record's row: the prefix of a pair's, and three answers as long as its longest."""
    longest = max(rows.completions)
    return Rows(prefix=rows.prefix, completions=(longest,) * ANSWERS, tiles=rows.tiles)


def _lens_states(probe: Asks, geometry: Geometry, rows: Rows) -> int:
    """States of one record that a probe reads through the head; a few (concepts, single neurons)
    count as none."""
    layers, image = geometry.decoder.layers, geometry.image_tokens
    counts: Mapping[str, Any] = {
        "layer_entropy": lambda s: layers * (s.image_tokens + s.response_tokens),
        "lens_confidence": lambda s: image * (len(s.layers) or min(s.count, layers)),
        "vcd_gap": lambda _: 2 * rows.scored,
    }
    return counts[probe.name](probe.settings) if probe.name in counts else 0
