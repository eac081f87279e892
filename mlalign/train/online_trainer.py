"""Online DPO: pairs of the policy's own answers of this moment, by what the rewards say of them.

Guo et al., 2402.04792. Of each group the answers with the highest and the lowest reward are chosen
and rejected, and any objective of mlalign/objectives is their loss; per optimiser step the mean
over its groups. A group whose rewards are all equal prefers nothing: it is counted
(``online/ties``) and adds zero. Sampling, scoring and whole groups are those of ``group_trainer``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlalign.branching.batch import TokenLogps
from mlalign.branching.logps import completion_logps
from mlalign.branching.views import by_view
from mlalign.credit.group import equal_groups
from mlalign.train.group_trainer import GroupTrainer
from mlalign.train.rollouts import Rollout, scored


class OnlineTrainer(GroupTrainer):
    """``objective``: of mlalign/objectives, without views of the image and without segments."""

    shown = (("loss", "loss"), ("reward", "reward"))

    def __init__(self, *args: Any, objective: Any, **kwargs: Any) -> None:
        if getattr(objective, "views", ()) or getattr(objective, "edits", False):
            raise ValueError(
                "train.objective: online_dpo has no second image and no segments for its pairs. "
                "Name dpo, ipo, hinge... "
            )
        self.objective = objective
        super().__init__(*args, **kwargs)

    def _roll(self, indices: list[int]) -> list[dict[str, Any]]:
        examples = [self.examples[index] for index in indices]
        with self._sampling():
            completions = self.roller.sample(examples, self.state.global_step)
        rollout = scored(self.roller, completions, self.accelerator.num_processes)
        arguments: Any = self.args
        size, parts = self.roller.sampling.group, arguments.steps_per_generation
        pairs = _extremes(rollout.total_R, size)
        tied_G = equal_groups(rollout.total_R, size)
        self._report(rollout, {"online/ties": float(tied_G.double().mean())})
        per = len(pairs) // parts
        return [
            self._pairs(rollout, pairs[i * per : (i + 1) * per], tied_G[i * per : (i + 1) * per])
            for i in range(parts)
        ]

    def _pairs(
        self, rollout: Rollout, pairs: list[tuple[int, int]], tied_N: Tensor
    ) -> dict[str, Any]:
        roller: Any = self.roller
        picked = [rollout.completions[row] for pair in pairs for row in pair]
        batch = roller.rows(picked, size=2).to(self.accelerator.device)
        if self.vlm.sees_frozen:
            batch = self.vlm.encode(batch)
        model: Any = self.accelerator.unwrap_model(self.model)
        with torch.no_grad(), model.disable_adapter():
            reference = self._token_logps(self.model_wrapped, batch)
        return {"batch": batch, "reference": reference, "tied_N": tied_N.to(batch.row_C.device)}

    def _token_logps(self, model: Any, batch: Any) -> TokenLogps:
        found = completion_logps(model, self.vlm.encode(batch, model), self.attention)
        return by_view(found, batch)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        batch, tied_N = inputs["batch"], inputs["tied_N"]
        out = self.objective(self._token_logps(model, batch), inputs["reference"])
        loss_N = out.per_pair_N.masked_fill(tied_N, 0.0)
        mode = "train" if self.model is not None and self.model.training else "eval"
        apart_N = out.margins_N[~tied_N]
        if len(apart_N):
            self._metrics[mode]["rewards/margins"].append(float(apart_N.mean()))
            self._metrics[mode]["rewards/accuracies"].append(float((apart_N > 0).float().mean()))
        return loss_N.mean() / self.current_gradient_accumulation_steps


def _extremes(total_R: Tensor, size: int) -> list[tuple[int, int]]:
    """(row with the highest reward, row with the lowest) of each group; the earlier of equals."""
    found = []
    for start in range(0, len(total_R), size):
        group = total_R[start : start + size].tolist()
        best, worst = group.index(max(group)), group.index(min(group))
        # A group of equals still makes a row of two; it is masked out.
        found.append((start + best, start + (worst if worst != best else (best + 1) % size)))
    return found
