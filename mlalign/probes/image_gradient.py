"""How much of the answer's gradient falls on the image: shares of image, prompt and response.

With x_t the input embedding of token t (for image tokens, what the projector gives), y a completion
and g_t the gradient of log pi(y | x, v), summed over its tokens, with respect to x_t:

    gradient_share          sum over a group's t of |g_t|        / the same over all groups
    input_gradient_share    sum over a group's t of |x_t . g_t|  / the same over all groups
    gradient_lift, input_gradient_lift    the image's share / its share of the tokens; chance = 1

Simonyan et al. (arXiv 1312.6034); gradient x input: Shrikumar et al. (1605.01713). |.| is the
Euclidean norm over the width, and the absolute value of the product. Shares are of a completion by
itself, lie in 0..1, and those of image, prompt (the other tokens of the prefix, template included)
and response (the completion's own tokens; its last one gets none) sum to 1. Metrics end in the
token group (gradient_share_image); the readings' group is the completion: own, chosen, rejected.

Sides: base, adapted, and delta (adapted minus base). Means over records with their intervals; the
noise is the mean absolute difference between two runs of the same model. A completion without any
gradient has no shares and is left out.

Not shown: effects. A gradient is local: a token in a saturated place gets none and may matter, and
the products add up to the log-prob for linear models only. The norm depends on the scale of the
embeddings (behind RMSNorm, an embedding twice as long gets half the gradient; image embeddings are
often much longer than those of words), the product does not: compare gradient_share between two
sides of one model only. What a family adds to the image tokens in later blocks (deepstack) is not
counted. Rare: three backward passes through the language model.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes._probe import GRADIENT, GROUPS, RARE, Probe, ProbeBatch, Watch
from mlalign.probes._records import COMPLETIONS
from mlalign.probes._stats import interval
from mlalign.probes._summaries import SIDES

KINDS = ("gradient", "input_gradient")
METRICS = (
    *(f"{kind}_share_{group}" for kind in KINDS for group in GROUPS),
    *(f"{kind}_lift" for kind in KINDS),
)


class Settings(BaseModel):
    """Settings of the probe: none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def shares(inputs_TD: Tensor, gradients_TD: Tensor, groups: dict[str, Tensor]) -> Tensor:
    """(len(METRICS),) float64, from embeddings and gradients of one row and one completion.

    ``groups``: positions of GROUPS; positions in none of them do not count. NaN where there is no
    gradient at all, or one that is not finite.
    """
    x_TD, g_TD = inputs_TD.float(), gradients_TD.float()
    sizes_KT = torch.stack([g_TD.norm(dim=-1), (x_TD * g_TD).sum(-1).abs()]).double()
    sums_KG = torch.stack([sizes_KT[:, groups[name]].sum(-1) for name in GROUPS], -1)
    total_K1 = sums_KG.sum(-1, keepdim=True)
    shares_KG = sums_KG / total_K1.masked_fill(~total_K1.isfinite(), math.nan)
    counts_G = torch.tensor([len(groups[name]) for name in GROUPS], dtype=torch.float64)
    image = GROUPS.index("image")
    lifts_K = shares_KG[:, image] / (counts_G[image] / counts_G.sum()).to(shares_KG.device)
    return torch.cat([shares_KG.flatten(), lifts_K])


class _Shares(Watch):
    def __init__(self, batch: ProbeBatch) -> None:
        super().__init__(batch)
        self.held: dict[int, np.ndarray] = {
            item.index: np.full((len(COMPLETIONS), len(METRICS)), math.nan) for item in batch.items
        }
        """Item index -> (completions, METRICS)."""
        self._groups = [self._of_completions(row) for row in range(len(batch.items))]

    def _of_completions(self, row: int) -> list[dict[str, Tensor]]:
        """Of each completion, the row's groups with its own tokens alone as the response."""
        groups, segment_T = self.batch.groups(row), self.batch.rows.segment_RT[row].cpu()
        return [
            {**groups, "response": (segment_T == number + 1).nonzero()[:, 0]}
            for number in range(len(COMPLETIONS))
        ]

    def gradient(self, completion: int, inputs_RTD: Tensor, gradients_RTD: Tensor) -> None:
        """Reduce one completion's gradients to shares at once."""
        for row, item in enumerate(self.batch.items):
            found = shares(inputs_RTD[row], gradients_RTD[row], self._groups[row][completion])
            self.held[item.index][completion] = found.cpu().numpy()


class ImageGradient(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "image_gradient"
    prefix = "probe/image_gradient"
    headline = "adapted"
    needs = frozenset({GRADIENT})
    tier = RARE

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Reduces gradients as they come."""
        return _Shares(batch)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Shares of both sides, by item."""
        assert isinstance(before, _Shares) and isinstance(after, _Shares)
        return [
            {
                "id": item.record.id,
                "base": before.held[item.index],
                "adapted": after.held[item.index],
            }
            for item in batch.items
        ]

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Per record and over the set, by completion."""
        records = [value for rank in values for value in rank]
        repeats = [value for rank in noise for value in rank]
        ids = [record["id"] for record in records]
        made: list[ProbeReading] = []
        for side in SIDES:
            table = _table(records, side)
            floor = np.abs(_table(repeats, "delta"))
            for k, group in enumerate(COMPLETIONS):
                for m, metric in enumerate(METRICS):
                    fixed = {"step": step, "probe": self.name, "side": side}
                    fixed |= {"metric": metric, "group": group}
                    made += _readings(fixed, ids, table[:, k, m], floor[:, k, m])
        return made


def _table(records: list[Any], side: str) -> np.ndarray:
    """(N, completions, METRICS)."""
    if not records:
        return np.zeros((0, len(COMPLETIONS), len(METRICS)))
    sides = {name: np.stack([record[name] for record in records]) for name in ("base", "adapted")}
    return sides["adapted"] - sides["base"] if side == "delta" else sides[side]


def _readings(
    fixed: dict[str, Any], ids: list[str], values_N: np.ndarray, floor_N: np.ndarray
) -> list[ProbeReading]:
    there = np.isfinite(values_N)
    kept, floor = values_N[there], floor_N[np.isfinite(floor_N)]
    low, high = interval(kept.tolist(), [1] * len(kept))
    whole = ProbeReading(
        record="",
        value=float(kept.mean()) if len(kept) else math.nan,
        lo=low,
        hi=high,
        noise=float(floor.mean()) if len(floor) else math.nan,
        n=len(kept),
        **fixed,
    )
    return [whole] + [
        ProbeReading(record=record, value=float(value), **fixed)
        for record, value in zip(np.array(ids)[there], kept, strict=True)
    ]


METHOD = ImageGradient
