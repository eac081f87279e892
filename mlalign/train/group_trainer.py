"""TRL's group trainers over branching rows: a group is one prefix and its K completions.

``GRPOTrainer`` and ``RLOOTrainer`` keep their losses, clips, KL and metric names. What differs: who
samples (``rollouts``), who scores (``mlalign.rewards``, spans included), what a token's advantage
is (``mlalign.credit.group``), and how log-probs are made: the prefix of a group once, not once per
completion. Rows per process and micro-batch are whole groups, shuffled by group; TRL would scatter
the completions of a prompt over micro-batches.

Private names of TRL that this file touches, each asserted by a test: ``_prepare_inputs``,
``_get_train_sampler``,
``_get_per_token_logps_and_entropies``, ``_compute_loss``; ``_step`` and ``_metrics`` by use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer
from trl.models.utils import unwrap_model_for_generation

from mlalign.branching.batch import PrefixBatch
from mlalign.branching.logps import completion_logps
from mlalign.credit.group import Settings as CreditSettings
from mlalign.credit.group import group_credit
from mlalign.models._vlm import VLM
from mlalign.records import Example
from mlalign.rewards._combine import columns, summary
from mlalign.runlog import RunLog
from mlalign.train._sealed import Sealed
from mlalign.train.rollouts import GroupSampler, Roller, Rollout, prompts_of, scored, table


class _Branching(Sealed):
    """What both group trainers share. Give the keywords of ``__init__`` beside TRL's own."""

    shown = (("loss", "loss"), ("reward", "reward"))
    kl_in_reward = False
    """RLOO takes the KL off the reward; GRPO adds it to the loss."""

    def __init__(
        self: Any,
        *args: Any,
        vlm: VLM,
        roller: Roller,
        credit: CreditSettings,
        examples: Sequence[Example],
        beta: float,
        attention: str,
        log: RunLog,
        arm: str,
        checkpoint_facts: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        self.vlm, self.roller, self.credit, self.attention = vlm, roller, credit, attention
        self.examples = examples
        self.run_log, self.arm, self.checkpoint_facts = log, arm, checkpoint_facts
        self._queue: list[dict[str, Any]] = []
        super().__init__(*args, reward_funcs=[_scored_elsewhere], **kwargs)  # type: ignore[misc]
        # Told to TRL after its __init__, which would make a second copy of a given adapter.
        self.beta = beta

    def _get_train_sampler(self: Any, dataset: Any = None) -> GroupSampler:
        return GroupSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _prepare_inputs(self: Any, generation_batch: Any) -> dict[str, Any]:
        """The micro-batch of this pass; a new rollout where the last one is used up.

        ``generation_batch``: TRL's rows, each prompt K times in a row on this process.
        """
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or not self._queue:
            self._queue = self._roll(prompts_of(generation_batch, self.num_generations))
        return self._queue[self._step % steps]

    def _roll(self: Any, indices: list[int]) -> list[dict[str, Any]]:
        """Micro-batches of whole groups of a new rollout, in an order of their own."""
        examples = [self.examples[index] for index in indices]
        with self._sampling():
            completions = self.roller.sample(examples, self.state.global_step)
        rollout = scored(self.roller, completions, self.accelerator.num_processes)
        size, parts = self.num_generations, self.args.steps_per_generation
        generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        order = torch.randperm(len(examples), generator=generator).tolist()
        per = len(order) // parts
        groups = [order[i * per : (i + 1) * per] for i in range(parts)]
        picked = [[g * size + k for g in part for k in range(size)] for part in groups]
        batches = [self._micro_batch(rollout, rows) for rows in picked]
        total_R = rollout.total_R
        if self.kl_in_reward and self.beta:
            for rows, batch in zip(picked, batches, strict=True):
                total_R[rows] -= self.beta * batch.pop("kl_R").double().cpu()
        credit = group_credit(
            self.credit,
            total_R=total_R,
            level_R=rollout.level_R,
            spans=rollout.spans,
            mask_RT=rollout.mask_RT,
            group_size=size,
            reduce=self._sum,
        )
        tokens = self._sum(rollout.mask_RT.sum().double())
        for rows, batch in zip(picked, batches, strict=True):
            width = batch["completion_mask"].shape[1]
            advantages = credit.advantages_RT[rows, :width].to(self.accelerator.device)
            if self.kl_in_reward:
                advantages = credit.sequence_R[rows].to(self.accelerator.device)
            batch["advantages"] = advantages
            batch["num_items_in_batch"] = tokens.to(self.accelerator.device)
        self._report(rollout, credit.metrics)
        return batches

    def _micro_batch(self: Any, rollout: Rollout, rows: list[int]) -> dict[str, Any]:
        """TRL's inputs for the loss of these completions, all but the advantages."""
        batch = self.roller.rows([rollout.completions[row] for row in rows])
        batch = batch.to(self.accelerator.device)
        if self.vlm.sees_frozen:
            batch = self.vlm.encode(batch)
        mask = batch.mask_CS.int()
        inputs: dict[str, Any] = {
            "batch": batch,
            # TRL takes shapes from these; what is run are the rows.
            "prompt_ids": mask[:, :1],
            "prompt_mask": mask[:, :1],
            "completion_ids": mask,
            "completion_mask": mask,
        }
        reused = self.num_iterations > 1 or (
            self.args.gradient_accumulation_steps % self.args.steps_per_generation
        )
        old, reference = None, None
        with torch.no_grad():
            if reused or self.kl_in_reward:
                old = self._logps(self.model_wrapped, batch)[0]
            if self.beta:
                peft: Any = self.accelerator.unwrap_model(self.model)
                with peft.disable_adapter():
                    reference = self._logps(self.model_wrapped, batch)[0]
        if self.kl_in_reward:
            inputs["old_logps"] = (old * mask).sum(1)
            if reference is not None:
                inputs["kl_R"] = ((old - reference) * mask).sum(1)
            return inputs
        if old is not None:
            inputs["old_per_token_logps"] = old
        if reference is not None:
            inputs["ref_per_token_logps"] = reference
        return inputs

    def _logps(self: Any, model: Any, batch: PrefixBatch) -> tuple[Tensor, Tensor]:
        """(C, S) log-probs and entropies of the policy as it is sampled from."""
        out = completion_logps(
            model,
            self.vlm.encode(batch, model),
            self.attention,
            temperature=self.roller.sampling.temperature,
        )
        return out.logps_CS, out.entropy_CS

    def _get_per_token_logps_and_entropies(
        self: Any, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, None]:
        """(C, S) log-probs and entropies of the micro-batch under way, by a pass over its rows."""
        logps, entropy = self._logps(model, self._under_way)
        return logps, entropy, None

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._under_way = inputs["batch"]
        return super()._compute_loss(model, inputs)  # type: ignore[misc]

    @contextlib.contextmanager
    def _sampling(self: Any) -> Iterator[None]:
        """Whole weights for sampling: under ZeRO-3 they are gathered once, not at every token."""
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gather_deepspeed3_params=True
        ):
            yield

    def _sum(self: Any, value: Tensor) -> Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(value.to(self.accelerator.device), reduction="sum").cpu()

    def _report(self: Any, rollout: Rollout, credit: dict[str, float]) -> None:
        own = columns(rollout.combined)
        lengths = [float(len(c.token_ids)) for c in rollout.completions]
        own["completions/mean_length"] = lengths
        own["completions/clipped_ratio"] = [float(not c.stopped) for c in rollout.completions]
        own |= {key: [value] for key, value in credit.items()}
        ranks = gather_object([own])
        gathered = {
            key: [v for each in ranks for v in each.get(key, [])]
            for key in dict.fromkeys(key for each in ranks for key in each)
        }
        mode = "train" if self.model.training else "eval"
        for name, value in summary(gathered).items():
            self._metrics[mode][name].append(value)
        lines = [line for each in gather_object([table(rollout)]) for line in each]
        self.run_log.rollouts(self.arm, self.state.global_step, lines)


class GroupTrainer(_Branching, GRPOTrainer):
    """GRPO and its kin (``loss_type``), advantages by token."""


class LeaveOneOutTrainer(_Branching, RLOOTrainer):
    """RLOO: one advantage and one ratio per completion, the KL taken off its reward."""

    kl_in_reward = True


def _scored_elsewhere(*args: Any, **kwargs: Any) -> list[float]:
    """In the place of TRL's reward functions; never called."""
    raise NotImplementedError
