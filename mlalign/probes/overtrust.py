"""Does the answer lean on one of its own earlier tokens? OPERA's and DOPRA's column score.

For one answer of n tokens, W[i, j] is the attention of its token i (its own row, which produces
token i + 1) on its token j <= i: the largest over the heads of one block, divided by the row's sum
of these maxima over all columns. For every token t but the last:

    s_t[j]          product over i = j..t of scale x W[i, j]: how steadily j is looked at
    <name>_log      log10 of max over j of s_t[j], without OPERA's factor 1e-7; unbounded
    <name>_rate     log10(scale x W) at that column, mean over i = j..t; at most log10(scale)
    <name>_repeat   rows of the answer whose best column is the answer's commonest, over its rows

"opera" reads the last block (arXiv 2311.17911, as its code has it: scale 50, the whole answer as
window); "dopra" reads a middle one, the 12th of 32 (arXiv 2407.15130; its text was not at hand, so
what is read here is OPERA's score in the layer that its abstract names, and not its weighting).
Both papers punish the score while decoding and roll back where one column stays the best; here it
is a pattern, teacher-forced on the own, chosen and rejected answers, never across answers.

Groups: "response", every token that has a row; "real" and "absent" object words, whose AUROC is
that of <name>_log and <name>_rate. <name>_log grows with the place in the answer, and absent words
may stand later than real ones: <name>_rate is free of the length. A column that is looked at is
not an error: punctuation is. The rows are the tokens' own, unlike those of the other probes.
"""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mlalign.models._vlm import VLM
from mlalign.probes._attention_rows import RESPONSE, ROWS, RowProbe, RowWatch
from mlalign.probes._probe import ProbeBatch, Watch

NAMES = ("opera", "dopra")
PARTS = ("log", "rate", "repeat")
METRICS = tuple(f"{name}_{part}" for name in NAMES for part in PARTS)
PAPER_LAYERS, PAPER_LAYER = 32, 12


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    scale: float = Field(default=50.0, gt=0)
    """What W is multiplied with; sigma of the papers."""
    dopra_layer: int | None = Field(default=None, ge=0)
    """Layer of DOPRA's score, from 0; None: the one at the same depth as the 12th of 32."""


def middle_layer(layers: int) -> int:
    """Number, from 0, of the layer that is as deep as the 12th of 32."""
    return max(0, math.ceil(PAPER_LAYER * layers / PAPER_LAYERS) - 1)


def window(weights_HNT: Tensor, columns_N: Tensor) -> Tensor:
    """(N, N): W of one answer's own rows. ``columns_N``: where its tokens stand in the row."""
    largest_NT = weights_HNT.max(0).values
    return (largest_NT / largest_NT.sum(-1, keepdim=True))[:, columns_N]


def column_scores(w_NN: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) each: log10 of the best column's score after each row, its mean per row, and which."""
    # Products of hundreds of factors leave the range of floats: sums of logarithms do not.
    logs_NN = torch.where(
        torch.ones_like(w_NN, dtype=torch.bool).tril(), (scale * w_NN.double()).log10(), 0.0
    )
    scores_NN = logs_NN.cumsum(0)
    above = torch.ones_like(w_NN, dtype=torch.bool).triu(1)
    best = scores_NN.masked_fill(above, float("-inf")).max(-1)
    lengths_N = torch.arange(len(w_NN), device=w_NN.device) - best.indices + 1
    return best.values.float(), (best.values / lengths_N).float(), best.indices


class _Columns(RowWatch):
    def read(self, layer: int, row: int, weights_HQT: Tensor) -> Tensor | None:
        """(metrics, 1, Q): at each token but an answer's last; None for layers without a score."""
        probe = self.probe
        assert isinstance(probe, Overtrust)
        if layer not in probe.layer_of.values():
            return None
        queries = self.batch.queries(row)
        values_PQ = weights_HQT.new_full((len(PARTS), weights_HQT.shape[1]), float("nan"))
        for start, rows in zip(self.starts[row], queries, strict=True):
            if len(rows) < 2:
                continue
            # rows[i + 1], which produces token i + 1, is where token i stands.
            own_N = rows[1:].to(weights_HQT.device)
            w_NN = window(weights_HQT[:, start + 1 : start + len(rows)], own_N)
            log_N, rate_N, best_N = column_scores(w_NN, probe.settings.scale)
            place = slice(start, start + len(own_N))
            repeat = best_N.bincount().max() / len(best_N)
            values_PQ[:, place] = torch.stack([log_N, rate_N, repeat.expand_as(log_N)])
        values_MQ = values_PQ.new_full((len(METRICS), values_PQ.shape[1]), float("nan"))
        for number, name in enumerate(NAMES):
            if probe.layer_of[name] == layer:
                values_MQ[number * len(PARTS) : (number + 1) * len(PARTS)] = values_PQ
        return values_MQ[:, None]


class Overtrust(RowProbe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "overtrust"
    metrics = METRICS
    separates = tuple(metric for metric in METRICS if not metric.endswith("repeat"))

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.layer_of: dict[str, int] = {}
        """Score -> the layer it is read in."""

    def prepare(self, vlm: VLM) -> None:
        """Refuse attention that cannot be read row by row, and a layer that there is not."""
        super().prepare(vlm)
        wanted = self.settings.dopra_layer
        if wanted is not None and wanted >= self.layers:
            raise ValueError(
                f"overtrust: dopra_layer: {wanted}, but the model has layers 0 to {self.layers - 1}"
            )
        middle = middle_layer(self.layers) if wanted is None else wanted
        self.layer_of = {"opera": self.layers - 1, "dopra": middle}

    def groups(self, metric: str) -> tuple[str, ...]:
        """Repetition is one number of a whole answer; words have the others too."""
        return (RESPONSE,) if metric.endswith("repeat") else ROWS

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Scores the answers' own rows as they come."""
        return _Columns(batch, self)


METHOD = Overtrust
