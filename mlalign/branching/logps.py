"""Log-probs of completions: the only code that gathers, masks and sums them.

The head runs at the positions that predict completion tokens only, and the log-sum-exp is taken
in float32 whatever the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlalign.branching.batch import PrefixBatch, TokenLogps
from mlalign.branching.layout import attention_mask


def completion_logps(model: nn.Module, batch: PrefixBatch, **forward: Any) -> TokenLogps:
    """Per-token log-probs of every completion of the batch, by one forward pass. Gradients flow.

    ``model``: anything whose forward is that of a transformers LLaVA (also wrapped by PEFT or a
    DeepSpeed engine). ``forward``: further keywords for that forward. Raises FloatingPointError,
    naming the record ids, where a log-prob is not finite.
    """
    keep, index_CS = _kept_positions(batch.source_CS, batch.mask_CS)
    logits_RUV = _forward(model, batch, keep, **forward)
    logits_CSV = logits_RUV[batch.row_C[:, None], index_CS].float()
    out = _token_logps(logits_CSV, batch)
    _check_finite(out, batch)
    return out


def next_token_logps(model: nn.Module, batch: PrefixBatch, **forward: Any) -> Tensor:
    """(C, V) float32: log-probs of the token that follows each completion. No gradient.

    Raises FloatingPointError where they are not finite.
    """
    last_C1 = batch.last_C[:, None]
    keep, index_CS = _kept_positions(last_C1, torch.ones_like(last_C1, dtype=torch.bool))
    with torch.no_grad():
        logits_RUV = _forward(model, batch, keep, **forward)
        logits_CV = logits_RUV[batch.row_C, index_CS[:, 0]].float()
        logps_CV = logits_CV.log_softmax(-1)
    if not torch.isfinite(logps_CV.amax(-1)).all():
        raise FloatingPointError("the model returned logits that are not finite")
    return logps_CV


def _forward(model: nn.Module, batch: PrefixBatch, keep: Tensor, **forward: Any) -> Tensor:
    """Logits (R, U, V) at the kept positions U (the same columns for every row)."""
    return model(
        input_ids=batch.input_ids_RT,
        pixel_values=batch.pixel_values,
        attention_mask=additive_mask(batch, _dtype(model)),
        position_ids=batch.position_ids_RT,
        logits_to_keep=keep,
        use_cache=False,
        **forward,
    ).logits


def additive_mask(batch: PrefixBatch, dtype: torch.dtype) -> Tensor:
    """The 4-D mask that transformers hands on unchanged: 0 where seen, else the dtype's lowest."""
    seen = attention_mask(batch.segment_RT)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype that activations have: that of the embedding, which is never quantised."""
    inner: Any = model
    while not hasattr(inner, "get_input_embeddings"):
        inner = inner.module  # a DeepSpeed or DDP wrapper
    return inner.get_input_embeddings().weight.dtype


def _kept_positions(source_CS: Tensor, mask_CS: Tensor) -> tuple[Tensor, Tensor]:
    """The columns at which the head must run, and where each source position lies among them."""
    keep = torch.unique(source_CS[mask_CS])
    index_CS = torch.searchsorted(keep, source_CS.clamp(min=int(keep[0]), max=int(keep[-1])))
    return keep, index_CS


def _token_logps(logits_CSV: Tensor, batch: PrefixBatch) -> TokenLogps:
    logps_CSV = logits_CSV.log_softmax(-1)
    logps_CS = logps_CSV.gather(-1, batch.target_CS[..., None])[..., 0]
    mask_CS = batch.mask_CS
    with torch.no_grad():
        detached = logps_CSV.detach()
        entropy_CS = -(detached.exp() * detached).sum(-1)
        top1_CS = detached.argmax(-1) == batch.target_CS
        mean_logit_CS = logits_CSV.detach().mean(-1)
    return TokenLogps(
        logps_CS=logps_CS.masked_fill(~mask_CS, 0.0),
        mask_CS=mask_CS,
        entropy_CS=entropy_CS.masked_fill(~mask_CS, 0.0),
        top1_CS=top1_CS & mask_CS,
        mean_logit_CS=mean_logit_CS.masked_fill(~mask_CS, 0.0),
    )


def _check_finite(out: TokenLogps, batch: PrefixBatch) -> None:
    bad_C = ~torch.isfinite(out.logps_CS).all(-1)
    if bad_C.any():
        names = [
            batch.ids_C[i] if batch.ids_C else f"completion {i}" for i in bad_C.nonzero()[:, 0]
        ]
        raise FloatingPointError(
            f"log-probs are not finite for {', '.join(dict.fromkeys(names))}: the step is not "
            "applied. Lower the learning rate, or look at these records"
        )
