"""Whether a model can give what a probe needs, asked before the first pass."""

from __future__ import annotations

from typing import Any

from mlalign.branching.attention import refuse
from mlalign.branching.layout import lay_out
from mlalign.models import _vision
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
        _refuse_windows(vlm)
        if probe.needs & {ATTENTION, PROMPT_ATTENTION, *KNOCKOUTS}:
            refuse(vlm.core)
        if HIDDEN in probe.needs:
            _refuse_without_gate(vlm)
        if LENS in probe.needs:
            refuse_without_lens(vlm)
    except ValueError as error:
        raise ValueError(f"{probe.name}: {error}. Leave the probe out of probes.methods") from error


def _refuse_windows(vlm: VLM) -> None:
    """A sliding window is reproduced where it stands in the mask of the rows; a block that attends
    over one which the mask does not hold would see further here than it does in the model."""
    text = vlm.core.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [""] * len(vlm.layers)
    rows = lay_out([[vlm.pad_id]], [[[vlm.pad_id]]], pad_id=vlm.pad_id)
    held = dict(_vision.with_masks(vlm.core, vlm.family, rows).windows)
    for number, (layer, kind) in enumerate(zip(vlm.layers, kinds, strict=False)):
        attention: Any = getattr(layer, "self_attn", None)
        window = getattr(attention, "sliding_window", None)
        if window is not None and held.get(kind) != window:
            raise ValueError(
                f"{text.model_type}: block {number} attends over a sliding window of {window} "
                "tokens that the mask of the rows does not hold"
            )


def _refuse_without_gate(vlm: VLM) -> None:
    for number, layer in enumerate(vlm.layers):
        block: Any = layer
        for name in ("gate_proj", "down_proj"):
            if not hasattr(getattr(block, "mlp", None), name):
                raise ValueError(
                    f"layer {number} has no mlp.{name}; only gated MLPs (Llama, Mistral, Qwen2) "
                    "are read"
                )
