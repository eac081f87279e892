"""Direct preference optimisation (Rafailov et al., 2023, arXiv 2305.18290, equation 7).

    loss = -log sigmoid(beta * [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)])

Log-probs are summed over the tokens of a completion, not averaged; the loss is a mean over pairs,
taken by the trainer. The same number as TRL's ``loss_type="sigmoid"``. At policy = reference the
loss is ln 2. By hand: beta 0.1, log-ratios 2 and -1 give a margin of 0.3 and a loss of
-log sigmoid(0.3) = 0.554355. It is not length-normalised, and has no label smoothing.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from mlalign.branching.batch import ObjectiveOut, TokenLogps


class DpoSettings(BaseModel):
    """Settings of DPO."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference. A negative beta would prefer the rejected answer
    while all logged rewards look healthy, so it is refused."""


class Dpo:
    """-log sigmoid of the beta-scaled difference of log-ratios."""

    Settings = DpoSettings

    at_reference = math.log(2)
    """The loss where the policy is the reference."""

    def __init__(self, settings: DpoSettings) -> None:
        self.settings = settings

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S)."""
        ratio_C: Tensor = policy.sum_C() - reference.sum_C()
        chosen_N, rejected_N = ratio_C[0::2], ratio_C[1::2]
        beta = self.settings.beta
        margin_N = beta * (chosen_N - rejected_N)
        return ObjectiveOut(
            per_pair_N=-logsigmoid(margin_N),
            margins_N=margin_N.detach(),
            chosen_rewards_N=beta * chosen_N.detach(),
            rejected_rewards_N=beta * rejected_N.detach(),
            metrics={},
        )


METHOD = Dpo
