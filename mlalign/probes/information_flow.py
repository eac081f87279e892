"""Where information may flow, layer by layer: image to question, question and image to answer.

By layer, with A the attention weights (mean over heads):

    image_to_question   sum over image columns of A, at the question's own rows      share, 0..1
    question_to_answer  sum over question columns of A, at the rows of the answer    share, 0..1
    image_to_answer     sum over image columns of A, at the rows of the answer       share, 0..1
    <flow>_depth        sum over l of l x flow[l] / sum over l of flow[l] / (L - 1)   0 first layer,
                                                                                      1 last layer

The question is every prefix token after the last image token, the template's marks included; a row
of the question is that of the token itself, since it gathers and produces nothing here. A row of
the answer is the one that produces the token (row t - 1 for the token at t). Shares are of the
whole row; what is missing to 1 goes to the system text and to the question or answer itself.

The attention part of arXiv 2406.06579 (information converges in shallow layers and diverges in
deep ones) and 2411.18620 (image to question low, question to answer high), both of which also
intervene; here is only the pattern. Groups: "question"; "response", every token of the three
answers; "real" and "absent" object words, with the AUROC of image_to_answer and question_to_answer
(chance 0.5). Does not show that anything flowed: attention carries values, and knock-out alone
says whether they were used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes import _row_readings
from mlalign.probes._attention_rows import ROWS, RowProbe, RowWatch, reduce_rows
from mlalign.probes._probe import ATTENTION, PROMPT_ATTENTION, ProbeBatch, Watch

QUESTION = "question"
TO_QUESTION = "image_to_question"
TO_ANSWER = ("question_to_answer", "image_to_answer")


class Settings(BaseModel):
    """No settings: the flows are fixed, so that runs compare."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def depth(sums_NLH: np.ndarray) -> np.ndarray:
    """(N,): mean layer of each record's flow, weighted with it, over L - 1; NaN without any.

    ``sums_NLH``: sums over the same rows in every layer. A model of one layer gives 0.
    """
    flow_NL = sums_NLH.mean(-1)
    places_L = np.linspace(0, 1, flow_NL.shape[1]) if flow_NL.shape[1] > 1 else np.zeros(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (flow_NL * places_L).sum(1) / flow_NL.sum(1)


class _Flow(RowWatch):
    def read(self, layer: int, row: int, weights_HQT: Tensor) -> Tensor:
        """(3, H, Q): nothing, from the question, from the image."""
        device = weights_HQT.device
        question_HQ = weights_HQT[..., self.batch.after_image(row).to(device)].sum(-1)
        image_HQ = weights_HQT[..., self.batch.image_RT[row].to(device)].sum(-1)
        return torch.stack([torch.full_like(image_HQ, float("nan")), question_HQ, image_HQ])

    def prompt_attention(self, layer: int, row: int, weights_HQT: Tensor) -> None:
        """Sum what the question's rows take from the image."""
        image_T = self.batch.image_RT[row].to(weights_HQT.device)
        mass_MHQ = weights_HQT[..., image_T].sum(-1).mean(0)[None, None]
        sums_GMH, counts_GM = reduce_rows(mass_MHQ, torch.ones_like(mass_MHQ[0]))
        sums_MH, counts_M = np.zeros((len(self.probe.metrics), 1)), np.zeros(3)
        sums_MH[0], counts_M[0] = sums_GMH[0, 0], counts_GM[0, 0]
        self.add(row, layer, QUESTION, sums_MH, counts_M)


class InformationFlow(RowProbe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "information_flow"
    needs = frozenset({ATTENTION, PROMPT_ATTENTION})
    metrics = (TO_QUESTION, *TO_ANSWER)
    separates = TO_ANSWER

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def groups(self, metric: str) -> tuple[str, ...]:
        """The question's rows, or those of the answers."""
        return (QUESTION,) if metric == TO_QUESTION else ROWS

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Sums attention rows as they come."""
        return _Flow(batch, self)

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """The flows by layer and over all, and the depth of each."""
        made = super().readings(step, values, noise, weights)
        records = [value for rank in values for value in rank]
        repeats = [value for rank in noise for value in rank]
        ids = [record["id"] for record in records]
        for number, metric in enumerate(self.metrics):
            for group in self.groups(metric):
                cells, again = (
                    {side: self._depth(each, side, group, number) for side in ("base", "adapted")}
                    for each in (records, repeats)
                )
                fixed = {"step": step, "probe": self.name, "group": group}
                found = _row_readings.means(fixed, f"{metric}_depth", ids, cells, again)
                made += [reading for reading in found if reading.layer < 0]
        return made

    def _depth(self, records: list[Any], side: str, group: str, number: int) -> _row_readings.Cells:
        """(N, 1, 1): depth of each record's flow; a record counts once."""
        depth_N = depth(self.cells(records, side, group, number).sums_NLH)
        defined_N = ~np.isnan(depth_N)
        return _row_readings.Cells(
            np.where(defined_N, depth_N, 0)[:, None, None], defined_N[:, None].astype(float)
        )


METHOD = InformationFlow
