"""Hinge loss on DPO's margin: RSO's hinge-norm (Liu et al., 2023, arXiv 2309.06657).

    loss = max(0, 1 - beta * [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)])

Log-probs are summed over the tokens of a completion; the loss is a mean over pairs, taken by the
trainer. The same number as TRL's ``loss_type="hinge"``; beta is the paper's gamma. At policy =
reference the loss is 1. By hand: beta 0.1, log-ratios 2 and -1 give a margin of 0.3 and a loss of
0.7. A pair whose margin has reached 1 gives no gradient. It is not SLiC's own loss (Zhao et al.,
2023, arXiv 2305.10425), whose margin has no reference and which adds a cross-entropy term.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import relu

from mlalign.branching.batch import ObjectiveOut, TokenLogps
from mlalign.objectives._ratios import log_ratios, with_rewards


class HingeSettings(BaseModel):
    """Settings of the hinge loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    beta: float = Field(0.1, gt=0)
    """The margin that suffices is 1 / beta nats."""


class Hinge:
    """How far the beta-scaled margin falls short of 1."""

    Settings = HingeSettings

    at_reference = 1.0
    """The loss where the policy is the reference."""

    def __init__(self, settings: HingeSettings) -> None:
        self.settings = settings

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S)."""
        ratios = log_ratios(policy, reference)
        beta = self.settings.beta
        return with_rewards(relu(1 - beta * ratios.margin_N), ratios, beta)


METHOD = Hinge
