"""Negative log-prob of the chosen answer, as an objective on pairs: a part of ``mpo``.

    loss = -log pi(chosen) / tokens of chosen

The mean over the tokens of each chosen answer, then a mean over pairs, taken by the trainer: the
regulariser of iterative RPO (Pang et al., 2024, arXiv 2404.19733) and the generation loss of MPO
(Wang et al., 2024, arXiv 2411.10442). TRL's ``loss_type="sft"`` is another mean, over all chosen
tokens of the batch, so that a long answer weighs more: ``average: batch`` gives that number; the
two agree where all chosen answers are equally long. No closed form at policy = reference: the loss
there is that of the reference's own text. By hand: chosen log-probs -1 and -2 give 1.5. It never
looks at the rejected answer, nor at the reference but for the rewards that it logs.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from mlalign.branching.batch import ObjectiveOut, TokenLogps
from mlalign.objectives._ratios import Average, chosen_nll, log_ratios, with_rewards


class SftSettings(BaseModel):
    """Settings of the chosen answer's loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    average: Average = "pair"
    """"pair": each answer's mean counts alike. "batch": each chosen token of one forward pass
    counts alike (TRL); a pair's loss then depends on its batch-mates and on train.micro_batch_size.
    """


class Sft:
    """Per-token cross-entropy of the chosen answer."""

    Settings = SftSettings

    at_reference = None
    """No closed form."""

    def __init__(self, settings: SftSettings) -> None:
        self.settings = settings

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S).

        The rewards are log-ratios as they are: there is no beta.
        """
        ratios = log_ratios(policy, reference)
        return with_rewards(chosen_nll(policy, self.settings.average), ratios, beta=1.0)


METHOD = Sft
