"""Robust DPO, for labels of which a known share is flipped (Chowdhury et al., 2024, 2403.00409).

    loss = [(1 - e) * l(m) - e * l(-m)] / (1 - 2 e),   l(m) = -log sigmoid(m)
    m = beta * [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)],   e = label_smoothing

Its mean over flips of probability e is DPO's loss on the clean labels. Log-probs are summed over
the tokens of a completion; the loss is a mean over pairs, taken by the trainer. The same number as
TRL's ``loss_type="robust"``. At policy = reference the loss is ln 2 for every e. By hand: beta 0.1,
e 0.1, log-ratios 2 and -1 give m = 0.3 and (0.9 * 0.554355 - 0.1 * 0.854355) / 0.8 = 0.516855. It
falls without bound as m grows, so a negative loss is no fault. It is not the label smoothing of
conservative DPO, which adds the flipped term (TRL 1.16 ignores ``label_smoothing`` in its
"sigmoid"; LLaMA-Factory and ms-swift apply it there).
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field
from torch.nn.functional import logsigmoid

from mlalign.branching.batch import ObjectiveOut, TokenLogps
from mlalign.objectives._ratios import log_ratios, with_rewards


class RobustSettings(BaseModel):
    """Settings of robust DPO."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference."""
    label_smoothing: float = Field(0.1, ge=0, lt=0.5)
    """Probability that chosen and rejected were swapped by mistake; 0 is DPO. At 0.5 the labels
    say nothing."""


class Robust:
    """DPO's loss with the expected effect of flipped labels taken out."""

    Settings = RobustSettings

    at_reference = math.log(2)
    """The loss where the policy is the reference."""

    def __init__(self, settings: RobustSettings) -> None:
        self.settings = settings

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S)."""
        ratios = log_ratios(policy, reference)
        beta, flipped = self.settings.beta, self.settings.label_smoothing
        margin_N = beta * ratios.margin_N
        as_labelled_N, as_flipped_N = -logsigmoid(margin_N), -logsigmoid(-margin_N)
        loss_N = ((1 - flipped) * as_labelled_N - flipped * as_flipped_N) / (1 - 2 * flipped)
        return with_rewards(loss_N, ratios, beta)


METHOD = Robust
