"""mDPO (Wang et al., 2024, arXiv 2406.11839, equations 3 to 6): does the image matter?

    loss = -log sigmoid(beta * [d(chosen | image) - d(rejected | image)])          DPO
           -log sigmoid(beta * [d(chosen | image) - d(chosen | changed image)])    conditional
           -log sigmoid(beta * d(chosen | image) - anchor)                         anchored

with d = log pi - log ref, summed over the tokens of a completion. The three terms are added with
equal weights; the loss is a mean over pairs, taken by the trainer. The changed image is a crop of 1
to 20 % of the area (``image: crop``), a noised or blank one, or the record's own second image. At
policy = reference the loss is 3 ln 2 where the anchor is 0. By hand: beta 0.1, d = 2 (chosen), -1
(rejected), 0.5 (chosen behind the crop): 0.554355 + 0.620957 + 0.598139 = 1.773451.

The chosen answer is scored twice, so a row of its own (the changed image) is added to each pair.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.nn.functional import logsigmoid

from mlalign.branching.batch import ImageView, ObjectiveOut, TokenLogps
from mlalign.objectives._ratios import log_ratios, view_ratio, with_rewards

VIEW = "other_image"


class MdpoSettings(BaseModel):
    """Settings of mDPO."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference."""
    anchor: float = 0.0
    """What the chosen answer's reward is pushed above."""
    image: Literal["crop", "noise", "blank", "record"] = "crop"
    """What the conditional term compares with; record: the pair's ``rejected_image``."""
    area_min: float = Field(0.01, gt=0, le=1)
    """Least share of the image that a crop keeps."""
    area_max: float = Field(0.2, gt=0, le=1)
    """Largest share."""
    noise_step: int = Field(500, ge=0, le=999)
    """Diffusion step of 1000 of a noised image."""

    @model_validator(mode="after")
    def _in_order(self) -> MdpoSettings:
        if self.area_min > self.area_max:
            raise ValueError(f"area_min {self.area_min:g} is above area_max {self.area_max:g}")
        return self


class Mdpo:
    """DPO with a conditional and an anchored term."""

    Settings = MdpoSettings

    def __init__(self, settings: MdpoSettings) -> None:
        self.settings = settings
        of_image = {
            "crop": (("area_min", settings.area_min), ("area_max", settings.area_max)),
            "noise": (("step", float(settings.noise_step)), ("wrap", 0.0)),
        }
        self.views = (ImageView(VIEW, settings.image, settings=of_image.get(settings.image, ())),)
        self.at_reference = 2 * math.log(2) + math.log1p(math.exp(settings.anchor))

    def __call__(self, policy: TokenLogps, reference: TokenLogps) -> ObjectiveOut:
        """Completions are chosen and rejected by turns: ``logps_CS`` of shape (2N, S); the view
        ``other_image`` has the chosen ones (N, S) again.

        Metrics: the mean of each term, and how often the true image wins.
        """
        beta = self.settings.beta
        ratios = log_ratios(policy, reference)
        other_N = view_ratio(policy, reference, VIEW)
        terms = {
            "loss/dpo": -logsigmoid(beta * ratios.margin_N),
            "loss/conditional": -logsigmoid(beta * (ratios.chosen_N - other_N)),
            "loss/anchored": -logsigmoid(beta * ratios.chosen_N - self.settings.anchor),
        }
        metrics = {name: value.detach().mean() for name, value in terms.items()}
        metrics["rewards/image_margins"] = beta * (ratios.chosen_N - other_N).detach().mean()
        metrics["rewards/image_accuracies"] = (ratios.chosen_N > other_N).float().mean()
        return with_rewards(torch.stack([*terms.values()]).sum(0), ratios, beta, metrics)


METHOD = Mdpo
