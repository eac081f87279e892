"""Each answer of a pair classified by itself, good or bad: BCO's loss without its reward shift.

    loss = -log sigmoid(beta * (log pi - log ref)(chosen))
           -log sigmoid(-beta * (log pi - log ref)(rejected))

Log-probs are summed over the tokens of a completion; the loss is a mean over pairs, taken by the
trainer. The same number as TRL 1.16's ``loss_type="bco_pair"``. At policy = reference the loss is
2 ln 2. By hand: beta 0.1, log-ratios 2 and -1 give -log sigmoid(0.2) - log sigmoid(0.1) = 0.598139
+ 0.644397 = 1.242536. It is not BCO as published (Jung et al., 2024, arXiv 2404.04656), which
subtracts a running mean of the rewards inside both sigmoids; ms-swift keeps that mean, so its
"bco_pair" is another number.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field
from torch.nn.functional import logsigmoid

from mlalign.branching.batch import ObjectiveOut, TokenLogps
from mlalign.objectives._ratios import log_ratios, with_rewards


class BcoPairSettings(BaseModel):
    """Settings of the pair-wise classifier loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference."""


class BcoPair:
    """Binary cross-entropy of both rewards: the chosen one's up, the rejected one's down."""

    Settings = BcoPairSettings

    at_reference = 2 * math.log(2)
    """The loss where the policy is the reference."""

    def __init__(self, settings: BcoPairSettings) -> None:
        self.settings = settings

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S)."""
        ratios = log_ratios(policy, reference)
        beta = self.settings.beta
        loss_N = -logsigmoid(beta * ratios.chosen_N) - logsigmoid(-beta * ratios.rejected_N)
        return with_rewards(loss_N, ratios, beta)


METHOD = BcoPair
