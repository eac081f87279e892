"""The forwards over one batch: each view once, shown to every probe that needs it.

    image       the record's own: log-probs, and what probes need of its inside (attention rows,
                activations)
    views       log-probs alone, and last states: other pixels, or image columns hidden in blocks
    gradient    the image once more, with a graph from the input embeddings on

What is captured is handed out at once and not kept. Every forward also says, row by row, which
block is the first whose output is not finite.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlalign.branching.attention import capture_rows
from mlalign.branching.batch import PADDING, PrefixBatch, TokenLogps
from mlalign.branching.knockout import hide_columns
from mlalign.branching.logps import completion_logps
from mlalign.capture import capture
from mlalign.models._vlm import VLM
from mlalign.probes._items import seeing
from mlalign.probes._probe import (
    ATTENTION,
    BLANK,
    FINAL,
    GRADIENT,
    HIDDEN,
    KNOCKOUTS,
    NOISED,
    PROMPT_ATTENTION,
    SWAPPED,
    ProbeBatch,
)
from mlalign.probes._records import COMPLETIONS
from mlalign.probes._undisturbed import frozen

VIEWS = (BLANK, SWAPPED, NOISED, *KNOCKOUTS)
"""Views that are a forward of their own."""

Show = Callable[..., None]
"""(needs, method, *values): calls the method of every watch whose probe has all of the needs."""


@dataclass(frozen=True)
class Fault:
    """A record whose activations are not finite."""

    record: str
    view: str
    layer: int
    """The first block whose output is not finite; -1: what comes after the last one."""


def run_forwards(vlm: VLM, batch: ProbeBatch, needs: frozenset[str], show: Show) -> list[Fault]:
    """All forwards that ``needs`` ask for over one batch; what was not finite in them."""
    rows = vlm.encode(batch.rows)
    faults = _forward(vlm, batch, rows, "image", needs, show)
    for view in VIEWS:
        seen = seeing(vlm, batch, view) if view in needs else None
        if seen is not None:
            seen = rows if view in KNOCKOUTS else vlm.encode(seen)
            faults += _forward(vlm, batch, seen, view, needs, show)
    if GRADIENT in needs:
        faults += _gradients(vlm, batch, rows, show)
    return faults


def blocks_of(view: str, count: int) -> list[int]:
    """Numbers of the blocks in which ``view`` hides the image columns, of ``count``."""
    part = view.rpartition(".")[2]
    if part == "all":
        return list(range(count))
    thirds = np.array_split(np.arange(count), 3)
    return thirds[("early", "middle", "late").index(part)].tolist()


def _forward(
    vlm: VLM,
    batch: ProbeBatch,
    rows: PrefixBatch,
    view: str,
    needs: frozenset[str],
    show: Show,
) -> list[Fault]:
    """One forward of one view. ``rows``: with features."""
    inside = needs if view == "image" else frozenset()
    asked = frozenset() if view == "image" else frozenset({view})
    finite: list[Tensor] = []
    padding_RT = rows.segment_RT == PADDING

    def see(name: str, states: Tensor) -> None:
        layer, _, kind = name.partition(".")
        if kind == "residual":
            finite.append((torch.isfinite(states).all(-1) | padding_RT).all(-1))
        if kind == "final":
            show({FINAL, *asked}, "final", view, states[rows.row_C[:, None], rows.source_CS])
        elif HIDDEN in inside:
            show({HIDDEN}, "hidden", int(layer), kind, states)

    modules, inputs = _modules(vlm, mlp=HIDDEN in inside, final=FINAL in needs)
    with contextlib.ExitStack() as stack:
        if inside & {ATTENTION, PROMPT_ATTENTION}:
            stack.enter_context(_attention(vlm, batch, inside, show))
        if view in KNOCKOUTS:
            layers = [vlm.layers[number] for number in blocks_of(view, len(vlm.layers))]
            stack.enter_context(hide_columns(layers, batch.image_RT))
        stack.enter_context(capture(modules, inputs=inputs, reduce=see))
        logps = completion_logps(vlm.model, rows, attention=batch.attention, finite=False)
    show(asked, "logps", view, logps)
    return list(_faults(batch, view, torch.stack(finite).cpu(), logps))


def _faults(batch: ProbeBatch, view: str, finite_LR: Tensor, logps: TokenLogps) -> Iterator[Fault]:
    ends_C = torch.isfinite(logps.logps_CS).all(-1).cpu()
    for row, item in enumerate(batch.items):
        bad = (~finite_LR[:, row]).nonzero()[:, 0].tolist()
        if bad:
            yield Fault(item.record.id, view, bad[0])
        elif not ends_C[row * len(COMPLETIONS) : (row + 1) * len(COMPLETIONS)].all():
            yield Fault(item.record.id, view, -1)


def _modules(vlm: VLM, *, mlp: bool, final: bool) -> tuple[dict[str, nn.Module], set[str]]:
    """The modules whose activations are seen, and which of them give their input."""
    modules: dict[str, nn.Module] = {}
    for number, layer in enumerate(vlm.layers):
        block: Any = layer
        modules[f"{number}.residual"] = block
        if mlp:
            modules[f"{number}.gate"] = block.mlp.gate_proj
            modules[f"{number}.coefficient"] = block.mlp.down_proj
    if final:
        modules[".final"] = vlm.core.get_output_embeddings()
    return modules, {name for name in modules if name.endswith(("coefficient", "final"))}


def _attention(vlm: VLM, batch: ProbeBatch, wanted: frozenset[str], show: Show) -> Any:
    """Rows that produce the response, and those of the prompt after the image."""

    def sink(need: str) -> Callable[..., None]:
        return lambda layer, row, weights_HQT: show({need}, need, layer, row, weights_HQT)

    rows = range(len(batch.items))
    positions: dict[str, Sequence[Tensor]] = {
        ATTENTION: [torch.cat(batch.queries(row)) for row in rows],
        PROMPT_ATTENTION: [batch.after_image(row) for row in rows],
    }
    first, *more = [(positions[need], sink(need)) for need in positions if need in wanted]
    return capture_rows(vlm.layers, *first, also=more)


def _gradients(vlm: VLM, batch: ProbeBatch, rows: PrefixBatch, show: Show) -> list[Fault]:
    """Of each completion's log-prob with respect to what enters the first block."""
    # DeepSpeed's ZeRO-3 counts one backward pass per forward, and has parted the weights after it.
    once = not any(hasattr(parameter, "ds_id") for parameter in vlm.model.parameters())
    last = len(COMPLETIONS) - 1
    finite_R = torch.ones(len(batch.items), dtype=torch.bool, device=vlm.device)
    with frozen(vlm.model), torch.enable_grad():
        inputs_RTD, logps_CS = _graph(vlm, rows, batch.attention)
        for number in range(len(COMPLETIONS)):
            if number and not once:
                inputs_RTD, logps_CS = _graph(vlm, rows, batch.attention)
            total = logps_CS[number :: len(COMPLETIONS)].sum()
            keep = once and number < last
            (found_RTD,) = torch.autograd.grad(total, inputs_RTD, retain_graph=keep)
            finite_R &= torch.isfinite(found_RTD).flatten(1).all(1)
            with torch.no_grad():
                show({GRADIENT}, GRADIENT, number, inputs_RTD.detach(), found_RTD)
    pairs = zip(batch.items, finite_R.tolist(), strict=True)
    return [Fault(item.record.id, GRADIENT, -1) for item, finite in pairs if not finite]


def _graph(vlm: VLM, rows: PrefixBatch, attention: str = "auto") -> tuple[Tensor, Tensor]:
    """Input embeddings as the leaf of a graph, and the log-probs (C, S) at its end."""
    held: list[Tensor] = []

    def enter(_module: nn.Module, args: Any, keywords: dict[str, Any]) -> Any:
        leaf = keywords["inputs_embeds"].detach().requires_grad_()
        held.append(leaf)
        return args, {**keywords, "inputs_embeds": leaf}

    language = getattr(vlm.core.model, vlm.family.language_model)
    hook = language.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        logps = completion_logps(vlm.model, rows, attention=attention, finite=False)
    finally:
        hook.remove()
    return held[0], logps.logps_CS
