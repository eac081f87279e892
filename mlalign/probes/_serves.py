"""Whether a model can give what a probe needs, asked before the first pass."""

from __future__ import annotations

from typing import Any

from mlalign.branching.attention import refuse
from mlalign.models._vlm import VLM
from mlalign.probes._lens import refuse_without_lens
from mlalign.probes._probe import (
    ATTENTION,
    HIDDEN,
    KNOCKOUTS,
    LENS,
    PROMPT_ATTENTION,
    Probe,
)


def refuse_unserved(probe: Probe, vlm: VLM) -> None:
    """Raise ValueError, naming the probe and what is in the way, for a need that is not given."""
    try:
        if probe.needs & {ATTENTION, PROMPT_ATTENTION, *KNOCKOUTS}:
            refuse(vlm.core)
        if HIDDEN in probe.needs:
            _refuse_without_gate(vlm)
        if LENS in probe.needs:
            refuse_without_lens(vlm)
    except ValueError as error:
        raise ValueError(f"{probe.name}: {error}. Leave the probe out of probes.methods") from error


def _refuse_without_gate(vlm: VLM) -> None:
    for number, layer in enumerate(vlm.layers):
        block: Any = layer
        for name in ("gate_proj", "down_proj"):
            if not hasattr(getattr(block, "mlp", None), name):
                raise ValueError(
                    f"layer {number} has no mlp.{name}; only gated MLPs (Llama, Mistral, Qwen2) "
                    "are read"
                )
