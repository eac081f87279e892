"""FLOPs of a training step, two per multiply-add, in closed form.

Counted: the linears of every block, the two products of attention under the mask (and not the
masked pairs that a dense kernel computes besides), the head at completion positions, the tower and
the projector, the adapter. Not counted: norms, activations, the softmax, the optimiser.
What trains decides the backward: a frozen linear passes the gradient on (1 x its forward), a
trained one has a weight gradient besides (2 x); nothing is computed below the first adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from mlalign.estimate.geometry import Geometry
from mlalign.estimate.plan import Adapter, Plan, Tracked, track
from mlalign.estimate.rows import Rows

FLASH_BACKWARD = 2.5
"""Attention's backward over its forward where the scores are computed again: five products for
two. 2.0 where the weights were kept."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs by part."""

    linear: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    vision: float = 0.0
    adapter: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(getattr(self, each.name) for each in fields(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def __mul__(self, factor: float) -> Flops:
        return Flops(**{f.name: getattr(self, f.name) * factor for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What two counts of one step may differ in."""

    attention_backward: float = FLASH_BACKWARD
    """Over the forward."""
    head_recomputed: bool = False
    """Whether checkpointing runs the head again."""
    tower_passes: int = 1
    """Forwards of tower and projector for one row of K completions: 1 where policy, reference and
    completions share one; stock TRL makes 8 under checkpointing with a live reference."""
    tower_layers: int | None = None
    """Layers of the tower that count; None: all, as transformers runs them. Llava reads the last
    but one, so that one layer less would do."""
    adapter: bool = True
    """Whether the adapter's own FLOPs count."""
    whole_first_block: bool = False
    """Count the first block's input gradient even where nothing needs it."""


DEFAULT = Conventions()


def forward(geometry: Geometry, rows: Rows, adapter: Adapter | None = None) -> Flops:
    """One pass of the decoder over ``rows`` and of the head at completion positions; no tower."""
    decoder = geometry.decoder
    return Flops(
        linear=2.0 * decoder.layers * decoder.block_linear_weights * rows.tokens,
        attention=4.0 * decoder.attention_width * sum(_pairs(geometry, rows)),
        head=2.0 * decoder.width * decoder.vocabulary * rows.scored,
        adapter=2.0 * adapter.parameters(decoder) * rows.tokens if adapter else 0.0,
    )


def vision(geometry: Geometry, tiles: int = 1, layers: int | None = None) -> Flops:
    """One pass of tower and projector over the tiles of an image.

    Raises ValueError for ``layers`` of a tower that was counted and not derived.
    """
    tower, flops = geometry.tower, geometry.tower.flops
    if layers is not None:
        if not tower.layer_flops:
            raise ValueError(f"the layers of {tower.kind!r} cannot be counted apart: leave it None")
        flops -= (tower.layers - layers) * tower.layer_flops
    return Flops(vision=float(tiles * (flops + geometry.projector.flops)))


def backward(geometry: Geometry, plan: Plan, conventions: Conventions = DEFAULT) -> Flops:
    """The backward of one row: decoder, head, adapter, and a trained projector."""
    once = forward(geometry, plan.rows)
    if plan.adapter is None:
        # Every weight's gradient costs as much again; the embedding's is a scatter.
        out = Flops(linear=2 * once.linear, head=2 * once.head, attention=once.attention)
    else:
        linear = adapter = attended = 0.0
        pairs = _pairs(geometry, plan.rows)
        tracked = plan.input_tracked or conventions.whole_first_block
        for layer in range(geometry.decoder.layers):
            targets = plan.adapter.of(layer)
            seen = track(targets, tracked)
            frozen, trained = _per_token(geometry, plan.adapter.rank, targets, seen)
            linear, adapter = linear + frozen, adapter + trained
            attended += pairs[layer] * seen.attention
            tracked = seen.output
        out = Flops(
            linear=linear * plan.rows.tokens,
            head=once.head,
            attention=4.0 * geometry.decoder.attention_width * attended,
            adapter=adapter * plan.rows.tokens if conventions.adapter else 0.0,
        )
    out = replace(out, attention=out.attention * conventions.attention_backward)
    if plan.adapter is None or plan.projector:
        out = replace(out, vision=plan.rows.tiles * geometry.projector.backward_flops)
    return out


def step(geometry: Geometry, plan: Plan, conventions: Conventions = DEFAULT) -> Flops:
    """One row's share of a training step: policy forward and backward, what checkpointing computes
    again, a live reference, the tower. Times ``plan.step_pairs`` it is the step."""
    adapter = plan.adapter if conventions.adapter else None
    policy = forward(geometry, plan.rows, adapter)
    total = policy + backward(geometry, plan, conventions)
    if plan.checkpointing:
        total += Flops(
            linear=policy.linear,
            attention=policy.attention,
            adapter=policy.adapter,
            head=policy.head if conventions.head_recomputed else 0.0,
        )
    if plan.reference_live:
        total += forward(geometry, plan.rows)
    tower = vision(geometry, plan.rows.tiles, conventions.tower_layers)
    return total + tower * conventions.tower_passes


def ceiling(
    geometry: Geometry,
    shared: Plan,
    other: Plan,
    conventions: Conventions = DEFAULT,
    other_conventions: Conventions | None = None,
) -> float:
    """The speed-up of one step over another that arithmetic alone allows: other / shared."""
    there = step(geometry, other, other_conventions or conventions).total
    return there / step(geometry, shared, conventions).total


def _per_token(
    geometry: Geometry, rank: int, targets: frozenset[str], seen: Tracked
) -> tuple[float, float]:
    """Backward of one frozen block and of its adapters, per token, attention left out."""
    linear = adapter = 0.0
    for name, (inputs, outputs) in geometry.decoder.linears.items():
        reached = seen.reaches(name)
        linear += 2.0 * inputs * outputs * reached
        if name in targets:
            # Weight gradients of A and B, the gradient into A's output, and into its input.
            adapter += 2.0 * rank * (inputs + outputs + outputs + inputs * reached)
    return linear, adapter


def _pairs(geometry: Geometry, rows: Rows) -> list[int]:
    """Attended pairs of each block of the decoder."""
    windows = geometry.decoder.windows or (None,) * geometry.decoder.layers
    counts = {window: rows.attended_in(window, geometry.block) for window in set(windows)}
    return [counts[window] for window in windows]
