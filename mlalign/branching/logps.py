"""Log-probs of completions: the only code that gathers, masks and sums them.

One forward pass over the rows, the head at the positions that predict completion tokens only
(``branching.head``), everything after the logits in float32 whatever the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlalign.branching.batch import PrefixBatch, TokenLogps
from mlalign.branching.head import heads_replaced, project
from mlalign.branching.layout import attention_mask
from mlalign.branching.split import Branches, choose


def completion_logps(
    model: nn.Module,
    batch: PrefixBatch,
    attention: str = "auto",
    *,
    finite: bool = True,
    temperature: float = 1.0,
    **forward: Any,
) -> TokenLogps:
    """Per-token log-probs of every completion of the batch, by one forward pass. Gradients flow.

    ``model``: anything whose forward is that of a transformers vision-language model (also wrapped
    by PEFT or a DeepSpeed engine). ``batch``: with ``features`` (``VLM.encode``). ``attention``:
    dense, split or auto (``branching.attention.choose``). ``temperature``: divides the logits,
    so that the policy is the one that was sampled from. ``forward``: further keywords for that
    forward. Raises FloatingPointError, naming the record ids, where a log-prob is not finite, but
    for ``finite`` False.
    """
    rows_M, sources_M = _real(batch, batch.source_CS)
    target_M = batch.target_CS[batch.mask_CS]

    def head(linear: nn.Linear, hidden_RTD: Tensor) -> Tensor:
        return project(
            hidden_RTD[rows_M, sources_M], linear.weight, linear.bias, target_M, temperature
        )

    found_M4 = head_outputs(model, batch, attention, head, **forward)
    shape = batch.target_CS.shape
    table = found_M4.new_zeros(*shape, 4).masked_scatter(batch.mask_CS[..., None], found_M4)
    out = TokenLogps(
        logps_CS=table[..., 0],
        mask_CS=batch.mask_CS,
        entropy_CS=table[..., 1].detach(),
        top1_CS=table[..., 2].detach() > 0.5,
        mean_logit_CS=table[..., 3].detach(),
        edited_CS=batch.edited_CS,
    )
    if finite:
        _refuse(~torch.isfinite(out.logps_CS).all(-1), batch)
    return out


def next_token_logps(
    model: nn.Module, batch: PrefixBatch, attention: str = "auto", **forward: Any
) -> Tensor:
    """(C, V) float32: log-probs of the token that follows each completion. No gradient.

    Raises FloatingPointError, naming the record ids, where they are not finite.
    """

    def head(linear: nn.Linear, hidden_RTD: Tensor) -> Tensor:
        hidden_CD = hidden_RTD[batch.row_C, batch.last_C]
        return nn.functional.linear(hidden_CD, linear.weight, linear.bias)

    with torch.no_grad():
        logps_CV = head_outputs(model, batch, attention, head, **forward).float().log_softmax(-1)
    _refuse(~torch.isfinite(logps_CV.amax(-1)), batch)
    return logps_CV


def head_outputs(
    model: nn.Module, batch: PrefixBatch, attention: str, head: Any, **forward: Any
) -> Tensor:
    """What ``head(linear, hidden states (R, T, D))`` gives in the output head's place.

    Raises ValueError for a batch without image features.
    """
    if batch.features is None:
        raise ValueError("the batch has no image features: take it through VLM.encode first")
    core = unwrap(model)
    path = choose(core, batch, attention)
    keywords: dict[str, Any] = {}
    if path == "split":
        keywords["branches"] = Branches(batch)
        # A 4-D mask is handed on unchanged; the split path looks at the branches only.
        mask: Any = batch.segment_RT.new_zeros(1, 1, 1, 1, dtype=torch.bool)
    else:
        mask = model_masks(batch, _dtype(core))
    with heads_replaced(core.get_output_embeddings(), head):
        return model(
            input_ids=batch.input_ids_RT,
            attention_mask=mask,
            position_ids=batch.position_ids,
            mm_encoder_outputs={"image": batch.features},
            use_cache=False,
            **keywords,
            **forward,
        ).logits


def model_masks(batch: PrefixBatch, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """The batch's 4-D mask, or one for each layer type, as transformers hands them on unchanged."""
    if not batch.windows:
        return additive_mask(batch, dtype)
    masks = {kind: additive_mask(batch, dtype, window) for kind, window in batch.windows}
    return masks.get("", masks)


def additive_mask(batch: PrefixBatch, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """(R, 1, T, T): 0 where seen, else the dtype's lowest."""
    seen = attention_mask(batch, window)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside DeepSpeed, DDP and PEFT wrappers."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "module") and not hasattr(inner, "get_output_embeddings"):
            inner = inner.module
        else:
            return inner


def _dtype(core: Any) -> torch.dtype:
    """The dtype that activations have: that of the embedding, which is never quantised."""
    return core.get_input_embeddings().weight.dtype


def _real(batch: PrefixBatch, source_CS: Tensor) -> tuple[Tensor, Tensor]:
    """Row and position of every real completion token, completion by completion."""
    rows_CS = batch.row_C[:, None].expand_as(source_CS)
    return rows_CS[batch.mask_CS], source_CS[batch.mask_CS]


def _refuse(bad_C: Tensor, batch: PrefixBatch) -> None:
    if bad_C.any():
        names = [
            batch.ids_C[i] if batch.ids_C else f"completion {i}" for i in bad_C.nonzero()[:, 0]
        ]
        raise FloatingPointError(
            f"log-probs are not finite for {', '.join(dict.fromkeys(names))}: the step is not "
            "applied. Lower the learning rate, or look at these records"
        )
