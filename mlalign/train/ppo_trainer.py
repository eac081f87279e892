"""PPO over branching rows, as LLaVA-RLHF ran it: policy, reference, value and reward share a base.

One frozen base carries adapters: the policy's, the value's (which begins as the reward model's)
and the reward model's; without any it is the reference. Of each rollout the log-probs, the values
and the credit (``mlalign.credit.gae``) are found once; then ``iterations`` times over its
completions, in a new order each time,

    L = policy loss (clipped ratio, by token) + vf_coef * value loss (clipped)

each the mean over the tokens of the whole optimiser step (``mlalign.credit.losses``). Metrics have
the names of TRL's former PPO trainer. The two adapters take turns in one pass, which activation
checkpointing cannot repeat: it is off.

Private names of transformers that this file touches: ``_get_dataloader``, asserted by a test, and
``_train_batch_size``.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer
from trl.models.utils import unwrap_model_for_generation

from mlalign.branching.batch import PrefixBatch
from mlalign.branching.logps import completion_logps, head_outputs
from mlalign.credit.gae import ppo_credit
from mlalign.credit.losses import policy_loss, value_loss
from mlalign.models._adapters import adapter_in_place
from mlalign.models._scalar import ScalarModel
from mlalign.models._vlm import VLM
from mlalign.records import Example
from mlalign.rewards._combine import columns, summary
from mlalign.runlog import RunLog
from mlalign.train._sealed import SavesTrained, Sealed
from mlalign.train.rollouts import GroupSampler, Roller, Rollout, prompts_of, scored, table

POLICY, VALUE = "default", "value"


class ActorCritic(ScalarModel):
    """A PeftModel with the adapters ``default`` (policy) and ``value``, and the value's head."""

    temperature: float = 1.0
    """Of the policy: its logits are divided by it, sampled or trained."""

    def forward(self, batch: PrefixBatch, attention: str = "auto") -> tuple[Any, Tensor]:  # type: ignore[override]
        """Log-probs of the completions, and (C, S) float32 values: V_t, before token t is written.

        ``batch``: with features (``VLM.encode``).
        """
        return self.logps(batch, attention), self.values(batch, attention)

    def logps(self, batch: PrefixBatch, attention: str) -> Any:
        """The policy's."""
        with adapter_in_place(self.backbone, POLICY):
            return completion_logps(self.backbone, batch, attention, temperature=self.temperature)

    def values(self, batch: PrefixBatch, attention: str) -> Tensor:
        """(C, S), 0 at padding."""
        mask_CS = batch.mask_CS
        row_M = batch.row_C[:, None].expand_as(mask_CS)[mask_CS]
        at_M = batch.source_CS[mask_CS]

        def head(linear: nn.Linear, hidden_RTD: Tensor) -> Tensor:
            return self.score(hidden_RTD[row_M, at_M].float())[..., 0]

        with adapter_in_place(self.backbone, VALUE):
            value_M = head_outputs(self.backbone, batch, attention, head)
        return value_M.new_zeros(mask_CS.shape).masked_scatter(mask_CS, value_M)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A micro-batch of a rollout, with what was found when it was sampled."""

    batch: PrefixBatch
    old_CS: Tensor
    value_CS: Tensor
    advantage_CS: Tensor
    return_CS: Tensor
    tokens: Tensor
    """Real tokens of the optimiser step that it belongs to, over processes."""


class PpoTrainer(SavesTrained, Sealed, Trainer):
    """Trains an ``ActorCritic`` on its own answers."""

    loss_is_scaled_for_ga = True
    shown = (("loss", "loss"), ("reward", "reward"))

    def __init__(
        self,
        *args: Any,
        vlm: VLM,
        roller: Roller,
        settings: Any,
        examples: Sequence[Example],
        attention: str,
        log: RunLog,
        arm: str,
        checkpoint_facts: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """``settings``: those of ``algorithms.ppo``; a rollout is ``settings.rollout`` prompts."""
        self.vlm, self.roller, self.settings, self.attention = vlm, roller, settings, attention
        self.examples = examples
        self.run_log, self.arm, self.checkpoint_facts = log, arm, checkpoint_facts
        self._queue: list[_Part] = []
        self._passes = 0
        self._found: dict[str, list[float]] = defaultdict(list)
        super().__init__(*args, data_collator=_as_it_is, **kwargs)
        rows = settings.rollout * settings.group
        self.parts = rows // (
            self.args.per_device_train_batch_size * self.accelerator.num_processes
        )
        """Micro-batches of a rollout on this process."""

    def get_train_dataloader(self) -> Any:
        """A rollout's prompts at a time, each ``group`` times in a row."""
        rows: Any = self.train_dataset
        return self._get_dataloader(
            dataset=rows,
            description="Training",
            batch_size=self._train_batch_size * self.parts,
            sampler_fn=self._sampler,
            is_training=True,
        )

    def _sampler(self, dataset: Any) -> GroupSampler:
        return GroupSampler(
            data_source=dataset,
            mini_repeat_count=self.settings.group,
            batch_size=self.settings.rollout,
            repeat_count=self.settings.iterations * self.parts,
            seed=self.args.seed,
        )

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """The micro-batch of this pass; a new rollout, or a new order, where one is used up."""
        at = self._passes % (self.settings.iterations * self.parts)
        if at == 0 or not self._queue:
            self._rollout = self._roll(prompts_of(inputs, self.settings.group))
        if at % self.parts == 0 or not self._queue:
            self._queue = self._shuffled(self.state.global_step)
        self._passes += 1
        return {"part": self._queue[at % self.parts]}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The clipped losses of a micro-batch, as shares of the optimiser step's means."""
        part: _Part = inputs["part"]
        own = self.settings
        batch = self.vlm.encode(part.batch)
        logps, value_CS = model(batch, self.attention)
        mask_CS = part.batch.mask_CS
        world = self.accelerator.num_processes
        policy = policy_loss(
            logps.logps_CS,
            part.old_CS,
            part.advantage_CS,
            mask_CS,
            low=own.clip,
            count=part.tokens / world,
        )
        value = value_loss(
            value_CS,
            part.value_CS,
            part.return_CS,
            mask_CS,
            clip=own.value_clip,
            count=part.tokens / world,
        )
        loss = policy.loss + own.vf_coef * value.loss
        for name, each in {
            "loss/policy_avg": policy.loss,
            "loss/value_avg": value.loss,
            "policy/clipfrac_avg": policy.clipped,
            "policy/approxkl_avg": policy.approx_kl,
            "val/ratio": policy.ratio,
            "val/clipfrac_avg": value.clipped,
            "policy/entropy_avg": (logps.entropy_CS * mask_CS).sum() / mask_CS.sum(),
        }.items():
            self._found[name].append(float(each.detach()))
        return (loss, {"values": value_CS}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the loss: means over the passes and rollouts since the last line."""
        if "loss" in logs:
            found = gather_object([dict(self._found)])
            for name in self._found:
                values = [v for each in found for v in each.get(name, [])]
                logs[name] = sum(values) / len(values)
            self._found.clear()
        super().log(logs, start_time)

    def _roll(self, indices: list[int]) -> list[dict[str, Tensor | PrefixBatch]]:
        """Micro-batches in the order of sampling."""
        examples = [self.examples[index] for index in indices]
        with self._sampling():
            completions = self.roller.sample(examples, self.state.global_step)
        rollout = scored(self.roller, completions, self.accelerator.num_processes)
        size = self.args.per_device_train_batch_size
        batches, found = [], []
        for start in range(0, len(completions), size):
            batch = self.roller.rows(completions[start : start + size])
            batch = self.vlm.encode(batch.to(self.accelerator.device))
            batches.append(batch)
            found.append(self._at_sampling(batch))
        width = rollout.mask_RT.shape[1]
        policy, reference, values = (
            torch.cat([_wide(each[i], width) for each in found]) for i in range(3)
        )
        credit = ppo_credit(
            self.settings.credit,
            level_R=rollout.level_R,
            spans=rollout.spans,
            policy_RT=policy,
            reference_RT=reference,
            values_RT=values,
            mask_RT=rollout.mask_RT.to(policy.device),
            reduce=self._sum,
        )
        self._report(rollout, credit.metrics)
        parts = []
        for number, batch in enumerate(batches):
            rows = slice(number * size, (number + 1) * size)
            own = batch.mask_CS.shape[1]
            parts.append(
                {
                    "batch": batch,
                    "old_CS": policy[rows, :own],
                    "value_CS": values[rows, :own],
                    "advantage_CS": credit.advantages_RT[rows, :own],
                    "return_CS": credit.returns_RT[rows, :own],
                }
            )
        return parts

    def _shuffled(self, seed: int) -> list[_Part]:
        """The rollout's micro-batches in a new order, with the tokens of each optimiser step."""
        generator = torch.Generator().manual_seed(self.args.seed + seed)
        order = torch.randperm(len(self._rollout), generator=generator).tolist()
        steps = self.args.gradient_accumulation_steps
        queue: list[_Part] = []
        for start in range(0, len(order), steps):
            own: list[Any] = [self._rollout[i] for i in order[start : start + steps]]
            count = torch.stack([each["batch"].mask_CS.sum() for each in own]).sum()
            tokens: Any = self.accelerator.reduce(count.float(), reduction="sum")
            queue += [_Part(**each, tokens=tokens) for each in own]
        return queue

    def _at_sampling(self, batch: PrefixBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(C, S) log-probs of policy and reference, and values; no gradient."""
        model: Any = self.model_wrapped
        inner: Any = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        with torch.no_grad():
            logps, values = model(batch, self.attention)
            with adapter_in_place(inner.backbone, None):
                reference = completion_logps(
                    inner.backbone, batch, self.attention, temperature=inner.temperature
                )
        model.train(training)
        mask = batch.mask_CS
        return logps.logps_CS * mask, reference.logps_CS * mask, values

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[None]:
        """Whole weights, and the policy's adapter alone."""
        inner: Any = self.accelerator.unwrap_model(self.model)
        wrapped: Any = self.model_wrapped
        with (
            unwrap_model_for_generation(wrapped, self.accelerator),
            adapter_in_place(inner.backbone, POLICY),
        ):
            yield

    def _sum(self, value: Tensor) -> Tensor:
        """Sum over processes."""
        moved = value.to(self.accelerator.device)
        summed: Any = self.accelerator.reduce(moved, reduction="sum")
        return summed.cpu()

    def _report(self, rollout: Rollout, credit: dict[str, float]) -> None:
        own = columns(rollout.combined)
        own["completions/mean_length"] = [float(len(c.token_ids)) for c in rollout.completions]
        own["completions/clipped_ratio"] = [float(not c.stopped) for c in rollout.completions]
        own |= {key: [value] for key, value in credit.items()}
        ranks = gather_object([own])
        keys = dict.fromkeys(key for each in ranks for key in each)
        gathered = {key: [v for each in ranks for v in each.get(key, [])] for key in keys}
        for name, value in summary(gathered).items():
            self._found[name].append(value)
        lines = [line for each in gather_object([table(rollout)]) for line in each]
        self.run_log.rollouts(self.arm, self.state.global_step, lines)


def _as_it_is(rows: list[Any]) -> Any:
    return rows


def _wide(value_CS: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(value_CS, (0, width - value_CS.shape[1]))
