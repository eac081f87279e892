"""The preference trainer: TRL's DPOTrainer with shared-prefix rows and any objective.

``DPOTrainer.__init__`` keeps the hard cases (PEFT wrapping, a frozen reference, ZeRO-3, QLoRA
casts); the loss, the batch and the checkpoint are ours. Private names of TRL and transformers that
this file touches, each asserted by a test: ``_metrics``, ``_get_num_items_in_batch``,
``_save_checkpoint``, ``_total_train_tokens``.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from mlalign.branching.batch import ImageView, ObjectiveOut, PrefixBatch, TokenLogps
from mlalign.branching.logps import completion_logps
from mlalign.branching.views import argmax_tokens, by_view, with_targets
from mlalign.models._vlm import VLM
from mlalign.runlog import RunLog
from mlalign.train._sealed import Sealed
from mlalign.train.gate import Gate, GateError, measure
from mlalign.train.references import References


class PreferenceTrainer(Sealed, DPOTrainer):
    """Trains on ``{"batch": PrefixBatch}`` with an objective of mlalign/objectives.

    The loss of an optimiser step is the sum over its pairs, of all micro-batches and processes,
    divided by their number. Metrics keep TRL's names.
    """

    # The loss is already divided by the pairs of the whole step.
    loss_is_scaled_for_ga = True
    shown = (("loss", "loss"), ("rewards/accuracies", "accuracy"))

    def __init__(
        self,
        *args: Any,
        vlm: VLM,
        objective: Any,
        attention: str = "auto",
        references: References | None = None,
        log: RunLog,
        arm: str,
        checkpoint_facts: dict[str, Any],
        keep_checkpoints: int = 2,
        **kwargs: Any,
    ) -> None:
        self.vlm = vlm
        self.objective = objective
        self.views: tuple[ImageView, ...] = getattr(objective, "views", ())
        if references is not None and any(view.scores == "argmax" for view in self.views):
            raise ValueError(
                "train.reference: cached cannot serve this objective, whose rejected tokens change "
                "while the model learns. Give train.reference: live"
            )
        self.attention = attention
        self.references = references
        self.gate: Gate | None = None
        """What the step-0 gate measured; None before it, and in a resumed run."""
        self.run_log = log
        self.arm = arm
        self.checkpoint_facts = checkpoint_facts
        self.keep_checkpoints = keep_checkpoints
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, PrefixBatch],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective over the batch, scaled to the optimiser step."""
        batch, policy, reference, out = self.outputs(model, inputs["batch"])
        if self.gate is None and self.is_in_train and self.state.global_step == 0:
            self._check_start(model, batch, policy, reference, out)
        world = self.accelerator.num_processes
        total = batch.num_pairs * world if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes, so each one's sum counts `world` times.
        loss = out.per_pair_N.sum() * world / total
        self._record(batch, policy, reference, out)
        return (loss, {"per_pair": out.per_pair_N}) if return_outputs else loss

    def outputs(
        self, model: Any, batch: PrefixBatch
    ) -> tuple[PrefixBatch, TokenLogps, TokenLogps, ObjectiveOut]:
        """The batch as it was run, log-probs of policy and reference, what the objective says."""
        batch = batch.to(self.accelerator.device)
        if self.vlm.sees_frozen:
            # One tower call for policy and reference: what an image gives is the same for both.
            batch = self.vlm.encode(batch, model)
            aside = {name: self.vlm.encode(each, model) for name, each in batch.aside.items()}
            batch = replace(batch, aside=aside)
        asked = self._with_argmax(model, batch, "policy")
        reference = self.reference_logps(asked)
        own = self._with_argmax(model, asked, "own")
        policy = by_view(self._logps(model, own), own)
        return batch, policy, reference, self.objective(policy, reference)

    def reference_logps(self, batch: PrefixBatch) -> TokenLogps:
        """The frozen reference on the same rows: adapter off, or the second copy; from the cache
        where there is one. No gradient."""
        if self.references is not None:
            found = self.references.get(batch, lambda: self._live_reference(batch)[0])
            return by_view(found, batch)
        return by_view(*self._live_reference(batch))

    def _live_reference(self, batch: PrefixBatch) -> tuple[TokenLogps, PrefixBatch]:
        model: Any = self.model
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if self.ref_model is not None:
                model = self.ref_model
            else:
                peft_model: Any = self.accelerator.unwrap_model(model)
                stack.enter_context(peft_model.disable_adapter())
            batch = self._with_argmax(model, batch, "own")
            return self._logps(model, batch), batch

    def _logps(self, model: Any, batch: PrefixBatch) -> TokenLogps:
        return completion_logps(model, self.vlm.encode(batch, model), self.attention)

    def _with_argmax(self, model: Any, batch: PrefixBatch, whose: str) -> PrefixBatch:
        """The batch with the likeliest tokens of its ``aside`` views that are ``whose`` to find."""
        wanted = {view.name for view in self.views if view.whose == whose}
        left = dict(batch.aside)
        for name in [name for name in batch.aside if name in wanted]:
            aside = self.vlm.encode(left.pop(name), model)
            target_NS = argmax_tokens(model, aside, self.attention)
            batch = with_targets(batch, name, target_NS)
        return replace(batch, aside=left)

    def _check_start(
        self,
        model: Any,
        batch: PrefixBatch,
        policy: TokenLogps,
        reference: TokenLogps,
        out: ObjectiveOut,
    ) -> None:
        """The step-0 gate. Raises GateError where the policy is not the reference."""
        collator: Any = self.data_collator
        mates = collator.with_a_mate(batch).to(self.accelerator.device)
        with torch.no_grad():
            again = by_view(self._logps(model, mates), mates)
        expected = getattr(self.objective, "at_reference", None)
        dtype = self.vlm.core.get_input_embeddings().weight.dtype
        self.gate = measure(batch, policy, again, reference, out.per_pair_N, expected, dtype)
        facts = {k: v for k, v in asdict(self.gate).items() if k != "record"}
        self.run_log.event(self.arm, "step-0 gate", **facts)
        fault = ""
        try:
            self.gate.check("cached" if self.references is not None else "live")
        except GateError as error:
            fault = str(error)
        # All ranks stop, or none: one that stopped alone would leave the others waiting.
        faults = [each for each in gather_object([fault]) if each]
        if faults:
            raise GateError(faults[0])

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Pairs of the optimiser step, over its micro-batches and all processes."""
        pairs = sum(sample["batch"].num_pairs for sample in batch_samples)
        counts: Any = self.accelerator.gather(torch.tensor(pairs, device=device))
        return counts.sum()

    def _record(
        self, batch: PrefixBatch, policy: TokenLogps, reference: TokenLogps, out: ObjectiveOut
    ) -> None:
        """Metrics under TRL's names, as sums and counts gathered once over the processes."""
        chosen_C = torch.arange(2 * batch.num_pairs, device=batch.row_C.device) % 2 == 0
        policy_C, reference_C = policy.sum_C().detach(), reference.sum_C()
        ratio_N = (policy_C - reference_C)[0::2] - (policy_C - reference_C)[1::2]
        tokens_C = policy.lengths_C()
        pairs, tokens = batch.num_pairs, tokens_C.sum()
        by_pair = {
            "rewards/chosen": out.chosen_rewards_N.sum(),
            "rewards/rejected": out.rejected_rewards_N.sum(),
            "rewards/margins": out.margins_N.sum(),
            "rewards/accuracies": (out.margins_N > 0).sum(),
            "logps/chosen": policy_C[chosen_C].sum(),
            "logps/rejected": policy_C[~chosen_C].sum(),
            # Not scaled by beta: a wrong sign of beta shows here and nowhere else.
            "logratios/margins": ratio_N.sum(),
        }
        by_pair |= {name: float(value) * pairs for name, value in out.metrics.items()}
        by_chosen = {
            "logits/chosen": policy.mean_logit_CS[chosen_C].sum(),
            "mean_token_accuracy": policy.top1_CS[chosen_C].sum(),
        }
        by_rejected = {"logits/rejected": policy.mean_logit_CS[~chosen_C].sum()}
        by_token = {"entropy": policy.entropy_CS.sum()}
        sums = [*by_pair.values(), *by_chosen.values(), *by_rejected.values(), *by_token.values()]
        counts = [pairs, tokens_C[chosen_C].sum(), tokens_C[~chosen_C].sum(), tokens]
        row = torch.stack(
            [torch.as_tensor(v, device=policy_C.device).float() for v in sums + counts]
        )
        row = torch.cat([row, (batch.segment_RT >= 0).sum()[None].float()])
        gathered: Any = self.accelerator.gather(row[None])
        row = gathered.sum(0).tolist()
        pairs, chosen, rejected, tokens, seen = row[-5:]
        model: Any = self.model
        mode = "train" if model.training else "eval"
        divisors = [pairs] * len(by_pair) + [chosen] * 2 + [rejected, tokens]
        names = [*by_pair, *by_chosen, *by_rejected, *by_token]
        for name, value, divisor in zip(names, row, divisors, strict=False):
            self._metrics[mode][name].append(value / divisor)
        if mode == "train":
            self._total_train_tokens += int(seen)
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
            self._log_pairs(batch, policy_C, reference_C, out)

    def _log_pairs(
        self, batch: PrefixBatch, policy_C: Tensor, reference_C: Tensor, out: ObjectiveOut
    ) -> None:
        columns = zip(
            batch.pair_ids,
            out.per_pair_N.tolist(),
            out.margins_N.tolist(),
            policy_C[0::2].tolist(),
            policy_C[1::2].tolist(),
            reference_C[0::2].tolist(),
            reference_C[1::2].tolist(),
            strict=True,
        )
        names = ("id", "loss", "margin", "chosen_logps", "rejected_logps")
        names += ("ref_chosen_logps", "ref_rejected_logps")
        rows = gather_object([dict(zip(names, values, strict=True)) for values in columns])
        self.run_log.pairs(self.arm, self.state.global_step + 1, rows)

    def before_checkpoint(self) -> None:
        """References that steps before it have used."""
        if self.references is not None:
            self.references.flush()


__all__ = ["DPOConfig", "PreferenceTrainer"]
