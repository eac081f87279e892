"""POVID (Zhou et al., 2024, arXiv 2402.11411): a rejected answer of the model's own, from noise.

Beside the rejected text of the pair stands what the model would say in place of the chosen answer
if the image were noised (diffusion step 500 of 1000): its likeliest token at each position, teacher
forced on the chosen answer. Those tokens are scored with the true image. With r = log pi - log ref,
summed over the tokens of a completion:

    form: one    -log sigmoid(alpha r(chosen) - beta_text r(rejected) - beta_noise r(noisy))
                 the paper's equation; alpha, beta_text, beta_noise in units of beta
    form: two    1/2 [-log sigmoid(beta (r(chosen) - r(noisy)))
                      -log sigmoid(beta (r(chosen) - r(rejected)))]        the released script

The loss is a mean over pairs, taken by the trainer. ``reference_tokens``: whether the reference
scores its own likeliest tokens (script) or the policy's (paper). At policy = reference both forms
are ln 2. By hand, beta 0.1, r = 2 (chosen), -1 (rejected), 0.5 (noisy): one with weights 1, 1/2,
1/2: -log sigmoid(0.1 (2 + 0.5 - 0.25)) = 0.586962; two: (0.620957 + 0.554355) / 2 = 0.587656.

The paper's first stage is ``dpo`` on the same pairs. The released code turns noisy values into 8
bits without clamping, so that they run over: ``wrap: true`` does the same.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch.nn.functional import logsigmoid

from mlalign.branching.batch import ImageView, ObjectiveOut, TokenLogps
from mlalign.objectives._ratios import log_ratios, view_ratio, with_rewards

VIEW = "noisy"


class PovidSettings(BaseModel):
    """Settings of POVID's second stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference."""
    form: Literal["one", "two"] = "one"
    """one: the paper's single sigmoid; two: the script's mean of two losses."""
    weight_chosen: float = Field(1.0, gt=0)
    """alpha / beta; with form: one."""
    weight_text: float = Field(0.5, ge=0)
    """beta_text / beta, of the pair's rejected answer; with form: one."""
    weight_noise: float = Field(0.5, ge=0)
    """beta_noise / beta, of the noisy tokens; with form: one."""
    noise_step: int = Field(500, ge=0, le=999)
    """Diffusion step of 1000."""
    wrap: bool = False
    """Let noisy values run over in 8 bits, as released, instead of clamping them."""
    reference_tokens: Literal["own", "policy"] = "own"
    """Whose likeliest tokens the reference scores."""


class Povid:
    """Two rejected answers: the pair's, and the model's own from a noised image."""

    Settings = PovidSettings
    at_reference = math.log(2)

    def __init__(self, settings: PovidSettings) -> None:
        self.settings = settings
        noise = (("step", float(settings.noise_step)), ("wrap", float(settings.wrap)))
        self.views = (
            ImageView(VIEW, "noise", "argmax", settings.reference_tokens, settings=noise),
        )

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S); the view
        ``noisy`` has N completions, of the chosen ones' lengths.

        Metrics: the reward margin against the noisy tokens.
        """
        wanted = self.settings
        ratios = log_ratios(policy, reference)
        noisy_N = view_ratio(policy, reference, VIEW)
        if wanted.form == "one":
            score_N = wanted.weight_chosen * ratios.chosen_N
            score_N = score_N - wanted.weight_text * ratios.rejected_N
            loss_N = -logsigmoid(wanted.beta * (score_N - wanted.weight_noise * noisy_N))
        else:
            by_noise_N = -logsigmoid(wanted.beta * (ratios.chosen_N - noisy_N))
            loss_N = (by_noise_N - logsigmoid(wanted.beta * ratios.margin_N)) / 2
        margin = wanted.beta * (ratios.chosen_N - noisy_N).detach().mean()
        return with_rewards(loss_N, ratios, wanted.beta, {"rewards/noisy_margins": margin})


METHOD = Povid
