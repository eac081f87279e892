"""Trains a reward model on pairs: which of two answers is better, and by how much.

Per pair, with r the score of an answer (in the sentence form, the sum over its sentences):

    L = - pair_weight * log sigmoid(r_chosen - r_rejected) + centering * C + sentence_weight * S

    C   keeps scores near zero, where the pairwise term leaves them free. "square":
        (r_chosen + r_rejected)^2 of each pair (Eisenstein et al. 2312.09244; TRL's). "abs_mean":
        |mean over the micro-batch of r_chosen + r_rejected| (LLaVA-RLHF's code), which depends on
        what stands in a micro-batch
    S   mean over the rated sentences of the pair of the binary cross-entropy of their scores, for
        records whose segments say which are wrong

The loss of an optimiser step is the sum over its pairs, of all micro-batches and processes, divided
by their number. It is not DPO: no reference, and scores of the whole model, not log-ratios.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import Trainer

from mlalign.models._vlm import VLM
from mlalign.runlog import RunLog
from mlalign.train._scored import ScoreBatch, ScoredRow
from mlalign.train._sealed import SavesTrained, Sealed


class LossSettings(BaseModel):
    """The three terms."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    pair_weight: float = Field(default=1.0, ge=0)
    """Weight of the comparison; 0: only the ratings of sentences are learned (ViGoR), and nothing
    is said of which answer of a pair scores higher."""

    centering: float = Field(default=0.0, ge=0)
    """Weight of C; LLaVA-RLHF has 1e-3."""
    centering_form: Literal["square", "abs_mean"] = "square"
    sentence_weight: float = Field(default=1.0, ge=0)
    """Weight of S; only the sentence form has it."""


def losses(
    settings: LossSettings, sum_C: Tensor, score_M: Tensor, label_M: Tensor, completion_M: Tensor
) -> Tensor:
    """(N,) loss of every pair; answers are chosen and rejected by turns.

    ``sum_C``: score of each answer. ``score_M``, ``label_M``: of each scored part, NaN where it was
    not rated. ``completion_M``: the answer that a part belongs to.
    """
    chosen_N, rejected_N = sum_C[0::2], sum_C[1::2]
    loss_N = -settings.pair_weight * torch.nn.functional.logsigmoid(chosen_N - rejected_N)
    if settings.centering:
        both_N = chosen_N + rejected_N
        spread_N = (
            both_N.square()
            if settings.centering_form == "square"
            else both_N.mean().abs().expand_as(both_N)
        )
        loss_N = loss_N + settings.centering * spread_N
    rated_M = ~torch.isnan(label_M)
    if settings.sentence_weight and rated_M.any():
        pair_M = completion_M[rated_M] // 2
        each_M = torch.nn.functional.binary_cross_entropy_with_logits(
            score_M[rated_M], label_M[rated_M], reduction="none"
        )
        zero_N = torch.zeros_like(loss_N)
        sums_N = zero_N.index_add(0, pair_M, each_M)
        counts_N = zero_N.index_add(0, pair_M, torch.ones_like(each_M))
        loss_N = loss_N + settings.sentence_weight * sums_N / counts_N.clamp_min(1)
    return loss_N


class RewardTrainer(SavesTrained, Sealed, Trainer):
    """Trains a ``ScalarModel`` on ``{"batch": ScoreBatch}``, answers by turns chosen, rejected."""

    # The loss is already divided by the pairs of the whole step.
    loss_is_scaled_for_ga = True
    shown = (("loss", "loss"), ("reward/accuracy", "accuracy"))

    def __init__(
        self,
        *args: Any,
        vlm: VLM,
        settings: LossSettings,
        attention: str,
        log: RunLog,
        arm: str,
        checkpoint_facts: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        self.vlm, self.settings, self.attention = vlm, settings, attention
        self.run_log, self.arm, self.checkpoint_facts = log, arm, checkpoint_facts
        self._sums: Tensor | None = None
        if not settings.pair_weight:
            self.shown = (("loss", "loss"), ("reward/sentence_accuracy", "accuracy"))
        super().__init__(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Tensor:
        """Pairs of the whole step, over processes."""
        own = sum(len(each["batch"].rows.row_C) // 2 for each in batch_samples)
        count = torch.tensor([own], device=self.accelerator.device)
        gathered: Any = self.accelerator.gather(count)
        return gathered.sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, ScoreBatch],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The pairwise loss over the batch, scaled to the optimiser step."""
        batch, score_M = self.scores(model, inputs["batch"])
        sum_C = batch.sums_C(score_M)
        loss_N = losses(self.settings, sum_C, score_M, batch.label_M, batch.completion_M)
        total = len(loss_N) if num_items_in_batch is None else num_items_in_batch
        loss = loss_N.sum() * self.accelerator.num_processes / total
        self._count(sum_C.detach(), score_M.detach(), batch)
        return (loss, {"scores": sum_C}) if return_outputs else loss

    def scores(self, model: Any, batch: ScoreBatch) -> tuple[ScoreBatch, Tensor]:
        """The batch on the device, and (M,) scores."""
        batch = batch.to(self.accelerator.device)
        inner: Any = self.accelerator.unwrap_model(model)
        rows = self.vlm.encode(batch.rows, inner.backbone)
        return batch, model(rows, batch.row_M, batch.position_M, self.attention)

    def _count(self, sum_C: Tensor, score_M: Tensor, batch: ScoreBatch) -> None:
        """Adds to what the next log line is the mean of."""
        margin_N = sum_C[0::2] - sum_C[1::2]
        rated_M = ~torch.isnan(batch.label_M)
        right_M = ((score_M > 0).float() == batch.label_M)[rated_M]
        each = [
            margin_N.new_tensor(float(len(margin_N))),
            (margin_N > 0).sum(),
            margin_N.sum(),
            sum_C[0::2].sum(),
            sum_C[1::2].sum(),
            rated_M.sum(),
            right_M.sum(),
        ]
        sums = torch.stack([value.float() for value in each])
        self._sums = sums if self._sums is None else self._sums + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the loss: accuracy and margin over the pairs since the last line."""
        if self._sums is not None and "loss" in logs:
            gathered: Any = self.accelerator.gather(self._sums[None])
            pairs, right, margin, chosen, rejected, rated, sentences = gathered.sum(0).tolist()
            if self.settings.pair_weight:
                logs |= {
                    "reward/accuracy": right / pairs,
                    "reward/margin": margin / pairs,
                    "reward/chosen": chosen / pairs,
                    "reward/rejected": rejected / pairs,
                }
            if rated:
                logs["reward/sentence_accuracy"] = sentences / rated
            self._sums = None
        super().log(logs, start_time)

    def judge(self, rows: list[ScoredRow], size: int) -> tuple[Tensor, Tensor]:
        """(N, 2) scores of chosen and rejected, and (2, parts) scores and labels of rated parts.

        Every process measures all rows: under ZeRO-3 a forward pass needs all of them.
        """
        collator: Any = self.data_collator
        model: Any = self.model_wrapped
        training = model.training
        model.eval()
        found, parts = [], []
        with torch.no_grad():
            for start in range(0, len(rows), size):
                batch, score_M = self.scores(model, collator.collate(rows[start : start + size]))
                found.append(batch.sums_C(score_M).view(-1, 2).float().cpu())
                rated_M = ~torch.isnan(batch.label_M)
                parts.append(torch.stack([score_M[rated_M], batch.label_M[rated_M]]).cpu())
        model.train(training)
        return torch.cat(found), torch.cat(parts, dim=1)
