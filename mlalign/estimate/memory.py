"""Bytes of a training step on one process, by part, in closed form.

    total = weights + trained + reference + optimiser + gradients + sharding
            + activations + features + head + peak

where ``peak`` is what is alive for a moment only: the head's tile, or one MLP's backward (with
checkpointing, the block that is computed again besides), whichever is larger. Not counted: the
framework itself (a CUDA context, 300 to 600 MB; libraries), fragmentation, the batch's pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from mlalign.estimate import activations
from mlalign.estimate.geometry import Geometry
from mlalign.estimate.plan import Plan

BITS_NF4 = 4 + 8 / 64 + 32 / (64 * 256)
"""Per weight: 4, and for every 64 weights an 8-bit scale, and for every 256 of those a float32."""
HEAD_TILE = 2**23
"""Logits (positions x vocabulary) that are there at once."""
HEAD_COPIES = 2
"""Of a tile's float32 logits: themselves, and their softmax that becomes the gradient."""
ZERO_LIVE = 10**9
"""DeepSpeed's default for the weights that ZeRO-3 may hold gathered (stage3_max_live_parameters);
the files of launch/ leave it as it is."""
ZERO_MASTER, ZERO_ADAM = 4, 8
"""Bytes per trained weight under ZeRO: a float32 copy, and Adam's two moments."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one process."""

    weights: int
    """Frozen weights (full fine-tuning: those of the tower)."""
    trained: int
    """Weights that train."""
    reference: int
    """A second frozen copy: full fine-tuning only."""
    optimizer: int
    """Adam's moments, and the float32 copies under ZeRO."""
    gradients: int
    sharding: int
    """Weights that ZeRO-3 gathers for a moment, and buckets."""
    activations: int
    """What autograd keeps of the decoder's forward."""
    features: int
    """Image features, shared by policy, reference and completions."""
    head: int
    """One vector of the width for each completion position: the gradient, which the forward of a
    frozen head computes; where the head trains, the hidden state."""
    peak: int
    """Alive for a moment only."""
    host: int
    """What ZeRO-3 with offload keeps in the host's memory; not part of the total."""

    @property
    def loaded(self) -> int:
        """What is there before the first step: weights, adapter, reference."""
        return self.weights + self.trained + self.reference

    @property
    def total(self) -> int:
        """All parts on the device."""
        return sum(getattr(self, each.name) for each in fields(self) if each.name != "host")


def estimate(geometry: Geometry, plan: Plan) -> Memory:
    """The memory of one process at its highest."""
    frozen, trained = weight_bytes(geometry, plan)
    count, shards = trained_parameters(geometry, plan), plan.processes
    # Full fine-tuning compares with what it started from: a frozen copy, there too while a cache
    # is filled.
    copied = plan.adapter is None
    reference = geometry.parameters * plan.dtype_bytes if copied else 0
    if plan.zero:
        optimizer = _share(count * (ZERO_MASTER + ZERO_ADAM), shards)
        gradients = _share(trained, shards)
    else:
        optimizer, gradients = 2 * trained, trained
    sharding, host = _sharding(geometry, plan), 0
    if plan.zero == 3:
        frozen, trained, reference = (_share(n, shards) for n in (frozen, trained, reference))
    if plan.offload:
        host = frozen + trained + reference + optimizer
        frozen = trained = reference = optimizer = 0
    moment = activations.working(geometry, plan)
    if plan.checkpointing:
        moment += activations.inside(geometry, plan)
    scored = plan.pairs * plan.rows.scored
    vocabulary, width = geometry.decoder.vocabulary, geometry.decoder.width
    tile = min(max(1, HEAD_TILE // vocabulary), scored) * vocabulary * activations.FLOAT
    # A head that trains gathers its gradient in float32.
    slope = vocabulary * width * activations.FLOAT if plan.adapter is None else 0
    return Memory(
        weights=frozen,
        trained=trained,
        reference=reference,
        optimizer=optimizer,
        gradients=gradients,
        sharding=sharding,
        activations=activations.saved(geometry, plan),
        features=activations.features(geometry, plan),
        head=scored * width * plan.dtype_bytes,
        peak=max(moment, HEAD_COPIES * tile + slope),
        host=host,
    )


def trained_parameters(geometry: Geometry, plan: Plan) -> int:
    """Weights that the optimiser steps."""
    if plan.adapter is None:
        return geometry.parameters - geometry.tower.parameters
    projector = geometry.projector_parameters if plan.projector else 0
    return plan.adapter.parameters(geometry.decoder) + projector


def weight_bytes(geometry: Geometry, plan: Plan) -> tuple[int, int]:
    """(frozen, trained). Quantisation takes the linears of the decoder's blocks; embedding, norms,
    head, tower and projector stay as they are."""
    size = plan.dtype_bytes
    trained = trained_parameters(geometry, plan) * plan.trained_bytes
    if plan.adapter is None:
        return geometry.tower.parameters * size, trained
    decoder = geometry.decoder
    linear = decoder.layers * decoder.block_linear_weights
    other = (geometry.parameters - linear) * size
    if plan.quantize == "4bit":
        return other + round(linear * BITS_NF4 / 8), trained
    if plan.quantize == "8bit":
        # A byte each, and a float32 scale for each output.
        outputs = sum(out for _, out in decoder.linears.values())
        return other + linear + 4 * decoder.layers * outputs, trained
    return other + linear * size, trained


def _sharding(geometry: Geometry, plan: Plan) -> int:
    """Weights that ZeRO-3 holds whole (DeepSpeed's own limit, or all), and gradient buckets: of
    width squared, as transformers fills the "auto" in launch/, or every gradient again under
    plain data parallelism."""
    if plan.processes == 1 and not plan.zero:
        return 0
    if not plan.zero:
        return trained_parameters(geometry, plan) * plan.trained_bytes
    bucket = geometry.decoder.width**2 * plan.dtype_bytes
    if plan.zero == 2:
        return bucket
    return bucket + min(ZERO_LIVE, geometry.parameters) * plan.dtype_bytes


def _share(count: int, processes: int) -> int:
    return -(-count // processes)
