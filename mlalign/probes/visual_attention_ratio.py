"""Visual attention at object words: does it tell true objects from invented ones?

For the rows that produce the tokens of an object word (row t - 1 for the token at t), with A the
attention weights, I the image tokens, H the heads:

    VAR[l, h]   sum over I of A[l, h]                               share, 0..1
    svar        sum over layers first..last of mean over h of VAR   0 .. last - first + 1
    var_auroc   P(a real word has more VAR than an absent one)      by layer and head; chance 0.5
    svar_auroc  the same of svar

arXiv 2411.16724 (Devils in Middle Layers of LVLMs): SVAR over layers 5 to 18 of the 32 of
LLaVA-1.5-7B (counted from 0, both ends included) parts real from hallucinated objects with an
AUROC up to 0.74. A word's value is the mean over its tokens. VAR itself stands in
attention_grounding as image_mass; here are the sum and what both part.

Groups of svar: "real" and "absent" words, and "response", every token of the three answers. AUROC
of every head at once is many looks at few words: the best of L x H heads is above 0.5 by chance,
so read its interval, or choose heads on one half of the records. Does not show that the attention
mattered: absent words also stand later and in other places of an answer than real ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes import _row_readings
from mlalign.probes._attention_rows import ROWS, RowProbe, RowWatch, words_by_layer
from mlalign.probes._probe import ProbeBatch, Watch

PAPER_LAYERS, PAPER_FIRST, PAPER_LAST = 32, 5, 18


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    first: int | None = None
    """First layer of SVAR, from 0; None: 5 / 32 of the layers, rounded down."""
    last: int | None = None
    """Last layer of SVAR, included; None: 18 / 32 of the layers, rounded down."""


def svar_range(layers: int, first: int | None = None, last: int | None = None) -> tuple[int, int]:
    """First and last layer of SVAR, both included, for a model of ``layers`` blocks.

    Raises ValueError, naming the setting, for a range that the model does not have.
    """
    first = PAPER_FIRST * layers // PAPER_LAYERS if first is None else first
    last = PAPER_LAST * layers // PAPER_LAYERS if last is None else last
    if not 0 <= first <= last < layers:
        raise ValueError(
            f"visual_attention_ratio: first: {first} and last: {last} are no range of the model's "
            f"layers 0 to {layers - 1}"
        )
    return first, last


class _Ratio(RowWatch):
    def read(self, layer: int, row: int, weights_HQT: Tensor) -> Tensor:
        """(1, H, Q): mass on the image."""
        image_T = self.batch.image_RT[row].to(weights_HQT.device)
        return weights_HQT[..., image_T].sum(-1)[None]


class VisualAttentionRatio(RowProbe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "visual_attention_ratio"
    metrics = ("var",)
    separates = ("var",)
    separate_heads = True
    heads = True

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._range = (0, 0)

    def groups(self, metric: str) -> tuple[str, ...]:
        """None: VAR itself is attention_grounding's image_mass."""
        return ()

    def prepare(self, vlm: VLM) -> None:
        """Refuse attention that cannot be read row by row, and a range of layers that is none."""
        super().prepare(vlm)
        self._range = svar_range(self.layers, self.settings.first, self.settings.last)

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Sums attention rows as they come."""
        return _Ratio(batch, self)

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """AUROC of VAR by layer and head; SVAR, by record and over the set, and its AUROC."""
        made = super().readings(step, values, noise, weights)
        records = [value for rank in values for value in rank]
        repeats = [value for rank in noise for value in rank]
        fixed: dict[str, Any] = {"step": step, "probe": self.name}
        ids = [record["id"] for record in records]
        for group in ROWS:
            cells, again = (
                {side: self._svar(each, side, group) for side in ("base", "adapted")}
                for each in (records, repeats)
            )
            found = _row_readings.means({**fixed, "group": group}, "svar", ids, cells, again)
            made += [reading for reading in found if reading.layer < 0]
        words, again = (
            _row_readings.Words(
                {side: self._words(each, side) for side in ("base", "adapted")},
                [record["real"] for record in each],
            )
            for each in (records, repeats)
        )
        found = _row_readings.separations(fixed, "svar", words, again)
        return made + [reading for reading in found if reading.layer < 0]

    def _svar(self, records: list[Any], side: str, group: str) -> _row_readings.Cells:
        """(N, 1, 1): sum over the range of layers."""
        cells = self.cells(records, side, group, 0)
        first, last = self._range
        sums_NLH = cells.sums_NLH[:, first : last + 1].mean(-1).sum(1)[:, None, None]
        return _row_readings.Cells(sums_NLH, cells.counts_NL[:, first : first + 1])

    def _words(self, records: list[Any], side: str) -> list[np.ndarray]:
        """(words, 1, 1) by record: SVAR of each word."""
        first, last = self._range
        return [
            each[:, first : last + 1].mean(-1).sum(1)[:, None, None]
            for each in words_by_layer(records, side, 0)
        ]


METHOD = VisualAttentionRatio
