"""Does attention at an object's word point at the object? By layer and head, at words with a box.

With a the attention of a head on the P image tokens, mean over the rows that produce the word's
tokens (row t - 1 for the token at t), and G the tokens inside the boxes of the named object:

    pointing           argmax of a lies in G                            rate, 0..1
    pointing_near      argmax of a lies within ``tolerance`` tokens of G (up, down, diagonal)
    iou                |top-|G| tokens of a, and G| / |either|          0..1
    patch_auroc        P(a token of G has more than one outside of it)  chance 0.5
    <...>_chance       what a random token or random tokens give: |G| / P; the same with the
                       tolerance; the mean IoU of |G| tokens drawn at random (hypergeometric)

Ties count by halves or in their share, so uniform attention gives the chance (iou: nearly). Read
at real words whose object has a box that the tower sees ("real"); absent words have none. box_share
and box_lift stand in attention_grounding. ``pointing_near`` needs a grid with as many cells as
there are image tokens, ``patch_auroc`` a token outside of G; else they are left out. Pointing game:
Zhang et al., arXiv 1608.00507. One reading per head is many looks at few words: the best head is
above chance by luck alone. Does not show that the head's look was used.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import hypergeom
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes import _row_readings
from mlalign.probes._attention_rows import REAL, RowProbe, RowWatch, reduce_rows, words_of
from mlalign.probes._probe import Item, ProbeBatch, Watch

METRICS = ("pointing", "pointing_near", "iou", "patch_auroc")
CHANCES = ("pointing_chance", "pointing_near_chance", "iou_chance")


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    tolerance: int = Field(default=1, ge=1)
    """Image tokens around the box that ``pointing_near`` still counts as hits."""


def near(inside_WP: Tensor, grid: tuple[int, int], tolerance: int) -> Tensor | None:
    """Bool (W, P): tokens at most ``tolerance`` rows and columns from those of ``inside_WP``; None
    where the tokens are no such grid of (rows, columns)."""
    if grid[0] * grid[1] != inside_WP.shape[-1]:
        return None
    mask = inside_WP.float().reshape(-1, 1, *grid)
    grown = torch.nn.functional.max_pool2d(mask, 2 * tolerance + 1, stride=1, padding=tolerance)
    return grown.reshape(inside_WP.shape) > 0


def pointing(map_HP: Tensor, inside_P: Tensor) -> Tensor:
    """(..., H): is the largest token inside; where several are largest, the share of them.

    Here and below maps are (..., H, P) and boxes (..., P): all words at once.
    """
    largest_HP = map_HP == map_HP.max(-1, keepdim=True).values
    return (largest_HP & inside_P[..., None, :]).sum(-1) / largest_HP.sum(-1)


def top_iou(map_HP: Tensor, inside_P: Tensor) -> Tensor:
    """(..., H): IoU of the |G| largest tokens with G; tokens that tie for the last place count in
    their share."""
    inside_1P = inside_P[..., None, :]
    size_1 = inside_1P.sum(-1)
    place_H1 = (size_1 - 1)[..., None].expand(*map_HP.shape[:-1], 1)
    last_H1 = map_HP.sort(-1, descending=True).values.gather(-1, place_H1)
    above_HP, tied_HP = map_HP > last_H1, map_HP == last_H1
    share_H = (size_1 - above_HP.sum(-1)) / tied_HP.sum(-1)
    both_H = (above_HP & inside_1P).sum(-1) + share_H * (tied_HP & inside_1P).sum(-1)
    return both_H / (2 * size_1 - both_H)


def patch_auroc(map_HP: Tensor, inside_P: Tensor) -> Tensor:
    """(..., H): P(a token inside has more than one outside), ties half; NaN where all are in."""
    inside_1P = inside_P[..., None, :]
    size_1 = inside_1P.sum(-1)
    ordered_HP = map_HP.sort(-1).values
    below = torch.searchsorted(ordered_HP, map_HP.contiguous(), right=False)
    upto = torch.searchsorted(ordered_HP, map_HP.contiguous(), right=True)
    # Twice the rank, a whole number: sums are exact.
    wins_H = ((below + upto + 1) * inside_1P).sum(-1) - size_1 * (size_1 + 1)
    # 0 / 0 where nothing is outside.
    return wins_H / (2 * size_1 * (inside_P.shape[-1] - size_1))


def chance_iou(size: int, tokens: int) -> float:
    """Mean IoU of ``size`` tokens drawn at random from ``tokens`` with ``size`` fixed ones."""
    both = np.arange(size + 1)
    return float((hypergeom.pmf(both, tokens, size, size) * both / (2 * size - both)).sum())


def chances(inside_WP: Tensor, near_WP: Tensor | None) -> np.ndarray:
    """(W, len(CHANCES)): what chance gives at each word; NaN without a grid."""
    nothing = torch.full((len(inside_WP),), float("nan"))
    by_word = [chance_iou(int(each.sum()), len(each)) for each in inside_WP]
    return np.stack(
        [
            inside_WP.float().mean(-1).numpy(),
            (nothing if near_WP is None else near_WP.float().mean(-1)).numpy(),
            np.array(by_word, dtype=np.float64),
        ],
        axis=-1,
    )


class _Boxes(RowWatch):
    def __init__(self, batch: ProbeBatch, probe: BoxLocalisation) -> None:
        super().__init__(batch, probe)
        self.chances: dict[int, np.ndarray] = {}
        """Item index -> (words with a box, chances)."""
        self._words: list[tuple[list[list[int]], Tensor, Tensor | None]] = []
        """Per row of the batch: rows of each word with a box, its box, and that with the ring."""
        for row, item in enumerate(batch.items):
            found = [
                ([self.starts[row][completion] + t for t in mention.tokens], mention.name)
                for completion, mention in words_of(item)
                if mention.real and mention.name in item.boxes
            ]
            size = int(batch.image_RT[row].sum())
            inside_WP = torch.zeros(len(found), size, dtype=torch.bool)
            for number, (_, name) in enumerate(found):
                inside_WP[number] = item.boxes[name].cpu()
            near_WP = near(inside_WP, probe.grid(item), probe.settings.tolerance)
            self._words.append(([tokens for tokens, _ in found], inside_WP, near_WP))
            self.chances[item.index] = chances(inside_WP, near_WP)

    def attention(self, layer: int, row: int, weights_HQT: Tensor) -> None:
        """Score every word with a box."""
        words, inside_WP, near_WP = self._words[row]
        if not words:
            return
        device = weights_HQT.device
        image_HQP = weights_HQT[..., self.batch.image_RT[row].to(device)]
        map_WHP = torch.stack([image_HQP[:, tokens].mean(1) for tokens in words])
        inside_WP = inside_WP.to(device)
        nothing_WH = torch.full_like(map_WHP[..., 0], float("nan"))
        values_MWH = torch.stack(
            [
                pointing(map_WHP, inside_WP),
                nothing_WH if near_WP is None else pointing(map_WHP, near_WP.to(device)),
                top_iou(map_WHP, inside_WP),
                patch_auroc(map_WHP, inside_WP),
            ]
        )
        # A map of NaN points nowhere, whatever the comparisons say.
        values_MWH = values_MWH.masked_fill(map_WHP.isnan().any(-1), float("nan"))
        values = values_MWH.transpose(1, 2)
        sums_GMH, counts_GM = reduce_rows(values, torch.ones(1, len(words), device=device))
        self.add(row, layer, REAL, sums_GMH[0], counts_GM[0])


class BoxLocalisation(RowProbe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "box_localisation"
    metrics = METRICS
    heads = True
    inert = frozenset(CHANCES)

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._vlm: VLM | None = None

    def groups(self, metric: str) -> tuple[str, ...]:
        """Only real words have a box."""
        return (REAL,)

    def prepare(self, vlm: VLM) -> None:
        """Refuse attention that cannot be read row by row."""
        super().prepare(vlm)
        self._vlm = vlm

    def grid(self, item: Item) -> tuple[int, int]:
        """(rows, columns) of the item's image tokens; (0, 0) where the family has no grid."""
        with contextlib.suppress(NotImplementedError):
            if self._vlm is not None:
                return self._vlm.grid(item.image.size)
        return (0, 0)

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Scores attention rows as they come."""
        return _Boxes(batch, self)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Both sides of every item, and the chances of its words."""
        assert isinstance(after, _Boxes)
        made = super().compare(batch, before, after)
        return [
            {**value, "chances": after.chances[item.index]}
            for item, value in zip(batch.items, made, strict=True)
        ]

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """The scores by layer and head, and their chances, which depend on the boxes alone."""
        made = super().readings(step, values, noise, weights)
        records = [value for rank in values for value in rank]
        ids = [record["id"] for record in records]
        fixed = {"step": step, "probe": self.name, "group": REAL}
        for number, metric in enumerate(CHANCES):
            columns = [record["chances"][:, number] for record in records]
            cells = _row_readings.Cells(
                np.array([np.nansum(each) for each in columns])[:, None, None],
                np.array([float((~np.isnan(each)).sum()) for each in columns])[:, None],
            )
            sides = {"base": cells, "adapted": cells}
            found = _row_readings.means(fixed, metric, ids, sides, sides)
            made += [each for each in found if each.side == "adapted" and each.layer < 0]
        return made


METHOD = BoxLocalisation
