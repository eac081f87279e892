"""What the objectives share: log-ratios of a pair, their averages, the rewards that are logged.

The rewards are TRL's in every objective, whatever the loss makes of them: beta times the log-ratio
summed over the tokens of a completion. Runs of different objectives can so be laid side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from mlalign.branching.batch import ObjectiveOut, TokenLogps

Average = Literal["pair", "batch"]
"""Over which tokens a log-prob is averaged: those of each completion, or of all in the batch."""


class Sides(NamedTuple):
    """One number per pair and side."""

    chosen_N: Tensor
    rejected_N: Tensor

    @property
    def margin_N(self) -> Tensor:
        """Chosen minus rejected."""
        return self.chosen_N - self.rejected_N


def log_ratios(policy: TokenLogps, reference: TokenLogps) -> Sides:
    """log pi - log ref of each completion, summed over its tokens; in nats, float32, (N,) each.

    Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S). Raises ValueError
    where policy and reference, or chosen and rejected, differ in number.
    """
    if policy.logps_CS.shape != reference.logps_CS.shape or len(policy.logps_CS) % 2:
        raise ValueError(
            "an objective takes chosen and rejected by turns, the same ones from policy and "
            f"reference: it was given log-probs of shape {tuple(policy.logps_CS.shape)} and "
            f"{tuple(reference.logps_CS.shape)} (completions, tokens)"
        )
    ratio_C = policy.sum_C() - reference.sum_C()
    return Sides(ratio_C[0::2], ratio_C[1::2])


def view_ratio(policy: TokenLogps, reference: TokenLogps, view: str) -> Tensor:
    """log pi - log ref of a view's completions, summed over tokens; in nats, float32, (N,).

    Raises ValueError, naming the view, where the batch has none of that name.
    """
    if view not in policy.views or view not in reference.views:
        raise ValueError(
            f"the objective compares with the view {view!r}, which the batch has not: it is asked "
            "for by the objective's ``views``, and the collator must be given them"
        )
    return policy.views[view].sum_C() - reference.views[view].sum_C()


def per_token(ratios: Sides, policy: TokenLogps) -> Sides:
    """The same, divided by the tokens of each completion: nats per token.

    NaN for a completion without tokens, which has no mean.
    """
    tokens_C = policy.lengths_C()
    return Sides(ratios.chosen_N / tokens_C[0::2], ratios.rejected_N / tokens_C[1::2])


def chosen_nll(policy: TokenLogps, average: Average) -> Tensor:
    """Negative log-prob of a chosen token, in nats, float32, (N,). Carries the gradient.

    ``average="pair"``: the mean over the pair's own tokens. ``"batch"``: scaled such that the mean
    over the pairs is the mean over all chosen tokens of the batch; a pair's number then depends on
    how long its batch-mates are.
    """
    nll_N, tokens_N = -policy.sum_C()[0::2], policy.lengths_C()[0::2]
    if average == "batch":
        return nll_N * len(tokens_N) / tokens_N.sum()
    return nll_N / tokens_N


def with_rewards(
    per_pair_N: Tensor, ratios: Sides, beta: float, metrics: Mapping[str, Tensor] | None = None
) -> ObjectiveOut:
    """The objective's result. ``ratios``: summed log-ratios. ``metrics``: scalars, no gradient."""
    return ObjectiveOut(
        per_pair_N=per_pair_N,
        margins_N=beta * ratios.margin_N.detach(),
        chosen_rewards_N=beta * ratios.chosen_N.detach(),
        rejected_rewards_N=beta * ratios.rejected_N.detach(),
        metrics=dict(metrics or {}),
    )
