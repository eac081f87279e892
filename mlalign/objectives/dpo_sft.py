"""DPO and the chosen answer's log-likelihood: RPO (Pang et al., 2024, arXiv 2404.19733).

    loss = -log sigmoid(beta * [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)])
           - sft_weight * log pi(chosen) / tokens of chosen

The first term is DPO's, on sums over tokens; the second is the mean over the tokens of each chosen
answer; their sum is a mean over pairs, taken by the trainer. It keeps the chosen answer likely,
which DPO alone does not. TRL writes it ``loss_type=["sigmoid", "sft"]`` with
``loss_weights=[1, sft_weight]`` (``rpo_alpha`` in old releases), and takes the second mean over all
chosen tokens of the batch: ``average: batch`` gives that number. No closed form at policy =
reference: ln 2 and the reference's own loss on the chosen answer. By hand: beta 0.1, log-ratios 2
and -1, chosen log-probs of -1 a token, weight 0.5 give 0.554355 + 0.5 = 1.054355. It is not
Nemotron-4's reward-aware preference optimisation, also called RPO.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch.nn.functional import logsigmoid

from mlalign.branching.batch import ObjectiveOut, TokenLogps
from mlalign.objectives._ratios import Average, chosen_nll, log_ratios, with_rewards


class DpoSftSettings(BaseModel):
    """Settings of DPO with the chosen answer's log-likelihood."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference."""
    sft_weight: float = Field(1.0, gt=0)
    """Weight of the second term, the paper's alpha; for 0 take ``dpo``."""
    average: Average = "pair"
    """"pair": each chosen answer's mean counts alike (the paper). "batch": each chosen token of one
    forward pass counts alike (TRL); a pair's loss then depends on its batch-mates."""


class DpoSft:
    """DPO's loss and a weighted per-token cross-entropy of the chosen answer."""

    Settings = DpoSftSettings

    at_reference = None
    """No closed form."""

    def __init__(self, settings: DpoSftSettings) -> None:
        self.settings = settings

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S)."""
        ratios = log_ratios(policy, reference)
        settings = self.settings
        dpo_N = -logsigmoid(settings.beta * ratios.margin_N)
        sft_N = chosen_nll(policy, settings.average)
        metrics = {"loss/dpo": dpo_N.detach().mean(), "loss/sft": sft_N.detach().mean()}
        return with_rewards(dpo_N + settings.sft_weight * sft_N, ratios, settings.beta, metrics)


METHOD = DpoSft
