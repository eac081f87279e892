"""IPO: identity preference optimisation (Azar et al., 2023, arXiv 2310.12036, equation 17).

    loss = ((r_chosen - r_rejected) - 1 / (2 * beta))^2,   r = (log pi - log ref)(y) / tokens of y

The log-ratio is the mean over the tokens of a completion, as in TRL 1.16's ``loss_type="ipo"``
(its authors say that the paper's results were made so; the equation itself has sums). beta is the
paper's tau: the margin is drawn to 1 / (2 beta) nats per token, and not beyond, where DPO's has no
end. The loss is a mean over pairs, taken by the trainer. At policy = reference it is
1 / (4 beta^2), 25 for beta 0.1. By hand: beta 0.1, summed log-ratios 2 over 4 tokens and -1 over 2
give a margin of 0.5 + 0.5 = 1 and a loss of (1 - 5)^2 = 16. The rewards that are logged are beta
times the summed log-ratio, as TRL's; what the loss sees is ``logratios/per_token_margins``. It is
not the summed form of older releases.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from mlalign.branching.batch import ObjectiveOut, TokenLogps
from mlalign.objectives._ratios import log_ratios, per_token, with_rewards


class IpoSettings(BaseModel):
    """Settings of IPO."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    beta: float = Field(0.1, gt=0)
    """The paper's tau; the per-token margin is drawn to 1 / (2 beta)."""


class Ipo:
    """Squared distance of the per-token margin from 1 / (2 beta)."""

    Settings = IpoSettings

    def __init__(self, settings: IpoSettings) -> None:
        self.settings = settings

    @property
    def at_reference(self) -> float:
        """The loss where the policy is the reference: 1 / (4 beta^2)."""
        return 1 / (4 * self.settings.beta**2)

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S)."""
        ratios = log_ratios(policy, reference)
        margin_N = per_token(ratios, policy).margin_N
        beta = self.settings.beta
        metrics = {"logratios/per_token_margins": margin_N.detach().mean()}
        return with_rewards((margin_N - 1 / (2 * beta)).square(), ratios, beta, metrics)


METHOD = Ipo
