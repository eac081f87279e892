"""DPO on length-averaged log-ratios, with a reference (Tulu 3: Lambert et al., 2024, 2411.15124).

    loss = -log sigmoid(beta * (r_chosen - r_rejected)),   r = (log pi - log ref)(y) / tokens of y

The log-ratio is the mean over the tokens of a completion, the loss a mean over pairs, taken by the
trainer. The same number as TRL's ``loss_type="sigmoid_norm"``. At policy = reference the loss is
ln 2. By hand: beta 0.3, summed log-ratios 2 over 4 tokens and -1 over 2 give a margin of
0.3 * (0.5 + 0.5) and a loss of -log sigmoid(0.3) = 0.554355. The rewards that are logged are beta
times the summed log-ratio, as TRL's; what the loss sees is ``logratios/per_token_margins``. It is
not SimPO, which has no reference and a target margin.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field
from torch.nn.functional import logsigmoid

from mlalign.branching.batch import ObjectiveOut, TokenLogps
from mlalign.objectives._ratios import log_ratios, per_token, with_rewards


class DpoMeanSettings(BaseModel):
    """Settings of length-averaged DPO."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    beta: float = Field(gt=0)
    """Strength of the pull to the reference, per nat of a *mean* log-ratio: a value for the summed
    form is too small here by the length of an answer, so there is no default. Tulu 3 took 5."""


class DpoMean:
    """-log sigmoid of the beta-scaled difference of per-token log-ratios."""

    Settings = DpoMeanSettings

    at_reference = math.log(2)
    """The loss where the policy is the reference."""

    def __init__(self, settings: DpoMeanSettings) -> None:
        self.settings = settings

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S)."""
        ratios = log_ratios(policy, reference)
        margin_N = per_token(ratios, policy).margin_N
        beta = self.settings.beta
        metrics = {"logratios/per_token_margins": margin_N.detach().mean()}
        return with_rewards(-logsigmoid(beta * margin_N), ratios, beta, metrics)


METHOD = DpoMean
