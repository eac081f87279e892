"""Whether a run needs gradient checkpointing: a third of a step's time, where memory is short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mlalign.data.collate import TokenisedPair
from mlalign.estimate.auto import fits, free_bytes
from mlalign.estimate.geometry import GeometryError
from mlalign.estimate.plan import PlanError
from mlalign.estimate.rows import Rows
from mlalign.models._vlm import VLM
from mlalign.recipe import Recipe


def decide(recipe: Recipe, vlm: VLM, pairs: Sequence[TokenisedPair]) -> tuple[bool, str]:
    """(on or off, why) for ``train.gradient_checkpointing: auto``; the same on every rank.

    Off where the estimate of the longest pair's step without it fits into the free memory of every
    rank; on elsewhere, and where the model cannot be estimated.
    """
    longest = max(pairs, key=lambda p: len(p.prefix) + len(p.chosen) + len(p.rejected))
    try:
        rows = Rows(
            prefix=len(longest.prefix),
            completions=(len(longest.chosen), len(longest.rejected)),
            layout=recipe.train.layout,
        )
        dropped = fits(
            recipe,
            free_bytes(recipe.launch.processes),
            config=vlm.core.config,
            image_processor=vlm.processor.image_processor,
            rows=rows,
            reference_live=recipe.train.reference == "live",
            attention="dense" if recipe.train.attention == "dense" else "split",
            # On a GPU machine the weights are still on the host at this point.
            loaded=not torch.cuda.is_available(),
        )
    except (GeometryError, PlanError) as error:
        return True, f"cannot be estimated ({error}): set true or false"
    if _on_any_rank(not dropped):
        return True, "the step would not fit into 0.8 of the free memory without it"
    return False, "the step fits into 0.8 of the free memory without it"


def _on_any_rank(wanted: bool) -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return wanted
    device: Any = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    votes = torch.tensor(int(wanted), device=device)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return bool(votes)
