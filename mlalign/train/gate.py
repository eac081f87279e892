"""The step-0 gate: before the first step, the policy must be the reference.

A fresh adapter changes nothing, so |log pi - log ref| of every completion token must stay within
what the same model gives when it is asked twice: its noise floor, measured by running the policy
again with another batch-mate (the longest record of the data, in front). A wrong or stale
reference, a cache of another model or an adapter that is not fresh shows here, at once, instead of
as a loss that looks healthy. What it does not show is a wrong layout: with a fresh adapter any
layout agrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mlalign.branching.batch import PrefixBatch, TokenLogps

FACTOR = 4.0
"""Noise floors that a difference may be apart: the floor is measured once only."""
LEAST = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Nats; least bound by the dtype of the activations, for a floor measured as zero."""
LEAST_HALF = 0.05
"""The same for bfloat16 and float16: rounding of one logit of size 10."""


class GateError(RuntimeError):
    """The policy is not the reference at the start."""


@dataclass(frozen=True)
class Gate:
    """What was measured."""

    difference: float
    """Largest |log pi - log ref| of a token, in nats."""
    noise: float
    """Largest |log pi - log pi again| of a token."""
    bound: float
    """What the difference may be."""
    record: str
    """Where it is largest."""
    loss: float
    """Mean loss of the batch."""
    expected: float | None
    """The objective's loss where the policy is the reference, where it has a closed form."""
    tokens: int
    """Tokens of the longest completion."""

    def check(self, source: str) -> None:
        """Raise GateError where the policy is not the reference. ``source``: of the reference."""
        if not self.difference <= self.bound:
            raise GateError(
                f"step 0: policy and reference differ by {self.difference:.3g} nats at record "
                f"{self.record!r}; the same model asked twice differs by {self.noise:.3g}, so at "
                f"most {self.bound:.3g} is noise. The reference ({source}) is not the model that "
                "training starts from: look at model.path, model.start_adapter and, with "
                "train.reference: cached, at train.reference_folder"
            )
        if self.expected is not None and not abs(self.loss - self.expected) <= self.slack:
            raise GateError(
                f"step 0: the loss is {self.loss:.6f}, but this objective's is {self.expected:.6f} "
                "where policy and reference agree: the objective's file or its settings are wrong"
            )

    @property
    def slack(self) -> float:
        """How far the loss may be from its closed form: rounding, and every token of both sides off
        by the difference. IPO, the steepest, moves by 1 / beta per nat, 2 sqrt(loss) at the start.
        """
        size = abs(self.expected or 0.0)
        return 1e-4 * (1 + size) + 2 * self.tokens * self.difference * (1 + 2 * math.sqrt(size))


def measure(
    batch: PrefixBatch,
    policy: TokenLogps,
    again: TokenLogps,
    reference: TokenLogps,
    per_pair_N: Tensor,
    expected: float | None,
    dtype: torch.dtype,
) -> Gate:
    """The gate's numbers from three passes over one batch.

    ``again``: the policy's log-probs of the same completions, behind those of the batch-mate.
    ``per_pair_N``: losses. ``expected``: the loss at policy = reference. ``dtype``: of activations.
    """
    apart_CS = (policy.logps_CS - reference.logps_CS).detach().abs()
    own = slice(len(again.mask_CS) - len(policy.mask_CS), None)
    second = again.logps_CS[own][again.mask_CS[own]]
    noise = float((policy.logps_CS[policy.mask_CS] - second).detach().abs().max())
    worst = int(apart_CS.amax(-1).argmax())
    return Gate(
        difference=float(apart_CS.max()),
        noise=noise,
        bound=max(FACTOR * noise, LEAST.get(dtype, LEAST_HALF)),
        record=batch.ids_C[worst] if batch.ids_C else f"completion {worst}",
        loss=float(per_pair_N.detach().mean()),
        expected=expected,
        tokens=int(policy.lengths_C().max()),
    )
