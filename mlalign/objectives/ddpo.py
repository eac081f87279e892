"""Dense DPO (RLHF-V, Yu et al., 2023, arXiv 2312.00849, section 3.2).

    score = (sum of log p over unchanged tokens + gamma * sum over corrected tokens) / N
    N     = unchanged + gamma * corrected        1 where ``average`` is off
    loss  = -log sigmoid(beta * [(score pi - score ref)(chosen) - (score pi - score ref)(rejected)])

Corrected tokens are those of the record's segments, on both sides; a segment's own weight
multiplies gamma. With ``average`` (the paper) a score is a weighted mean over tokens, without it
(the released command) a weighted sum; the loss is a mean over pairs, taken by the trainer. The
paper has beta 0.5, gamma 5 and the mean; the released command beta 0.1, gamma 1.1 and the sum. With
gamma 1 and no average it is DPO, with gamma 1 and average ``dpo_mean``. At policy = reference the
loss is ln 2. By hand: beta 0.5, gamma 5, log-ratios (1, 0.2) with the second corrected and (-1):
scores (1 + 5 * 0.2) / 6 = 1/3 and -1, a loss of -log sigmoid(0.5 * 4/3) = 0.414370.

What is corrected was found when the pair was made; no text is compared here.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from mlalign.branching.batch import ObjectiveOut, TokenLogps
from mlalign.objectives._ratios import log_ratios, with_rewards


class DdpoSettings(BaseModel):
    """Settings of dense DPO."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    beta: float = Field(0.5, gt=0)
    """Strength of the pull to the reference."""
    gamma: float = Field(5.0, gt=0)
    """Weight of a corrected token; an unchanged one weighs 1."""
    average: bool = True
    """Divide by the weights: the paper. False: the released command."""


class Ddpo:
    """DPO with weighted tokens."""

    Settings = DdpoSettings
    edits = True
    """Needs ``edited_CS``: which tokens the record's segments cover."""
    at_reference = math.log(2)

    def __init__(self, settings: DdpoSettings) -> None:
        self.settings = settings

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S).

        Raises ValueError for a batch without ``edited_CS``. Metrics: the corrected share of tokens.
        """
        ratios = log_ratios(policy, reference)
        weight_CS = self._weights(policy)
        apart_CS = (policy.logps_CS - reference.logps_CS).masked_fill(~policy.mask_CS, 0.0)
        score_C = (weight_CS * apart_CS).sum(-1)
        if self.settings.average:
            score_C = score_C / weight_CS.sum(-1)
        loss_N = -logsigmoid(self.settings.beta * (score_C[0::2] - score_C[1::2]))
        assert policy.edited_CS is not None
        share = ((policy.edited_CS > 0) & policy.mask_CS).sum() / policy.mask_CS.sum()
        return with_rewards(loss_N, ratios, self.settings.beta, {"ddpo/corrected_share": share})

    def _weights(self, policy: TokenLogps) -> Tensor:
        """(C, S): 1 at unchanged tokens, gamma times the segment's weight at corrected ones."""
        if policy.edited_CS is None:
            raise ValueError("ddpo needs the tokens of the records' segments: edited_CS is missing")
        edited_CS = policy.edited_CS
        weight_CS = (self.settings.gamma * edited_CS).where(edited_CS > 0, 1.0)
        return weight_CS * policy.mask_CS


METHOD = Ddpo
