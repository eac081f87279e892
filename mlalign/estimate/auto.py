"""Whether a step fits without checkpointing: what ``train.gradient_checkpointing: auto`` asks."""

from __future__ import annotations

from typing import Any

from mlalign.estimate.geometry import Geometry, geometry_of, read
from mlalign.estimate.memory import estimate
from mlalign.estimate.plan import Attention, Plan, plan_of
from mlalign.estimate.rows import Rows
from mlalign.recipe import Recipe

FREE_SHARE = 0.8
"""Of the free memory that an estimate may fill; the rest is for what is not counted."""

HEAP = 2.5
"""Resident over asked for, on a CPU: glibc puts tensors under 32 MB on a heap that it seldom gives
back. Measured 2.2 to 2.5 on a decoder of 6 x 512; 1.0 with MALLOC_MMAP_THRESHOLD_=65536."""


def fits(
    recipe: Recipe,
    device_bytes: int,
    *,
    config: Any = None,
    image_processor: Any = None,
    rows: Rows | None = None,
    dtype: str | None = None,
    reference_live: bool = True,
    attention: Attention = "split",
    loaded: bool = False,
) -> bool:
    """Whether one process's step without gradient checkpointing stays within 0.8 of the memory that
    is free: True means that checkpointing can be dropped.

    ``device_bytes``: free now, for one process (``free_bytes``). ``config``, ``image_processor``:
    of the model, where they are at hand; None reads them by the recipe. ``rows``: the longest rows
    of the data; None takes assumed lengths (``plan.rows_of``). ``loaded``: the weights are there
    already, so that they are not in what is free. Raises GeometryError and PlanError for what
    cannot be estimated.
    """
    geometry = geometry_of(recipe.model) if config is None else read(config, image_processor)
    plan = plan_of(
        recipe,
        geometry,
        rows=rows,
        dtype=dtype,
        reference_live=reference_live,
        attention=attention,
        checkpointing=False,
    )
    return holds(geometry, plan, device_bytes, loaded=loaded)


def holds(geometry: Geometry, plan: Plan, device_bytes: int, *, loaded: bool = False) -> bool:
    """``fits`` for a plan: whether its memory stays within 0.8 of ``device_bytes``."""
    need = estimate(geometry, plan)
    # Adapter and second copy come with the trainer.
    there = need.weights + (need.trained if plan.adapter is None else 0)
    return need.total - (there if loaded else 0) <= FREE_SHARE * device_bytes


def free_bytes(processes: int = 1) -> int:
    """Bytes that this process's tensors can take: what is free on its GPU; without one, its share
    of the host's available memory, over ``HEAP``. ``processes``: of this machine."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available / processes / HEAP)
