"""What noise on the image changes in the answer: the contrast of visual contrastive decoding.

With v the record's image, v' the same under the forward diffusion of VCD (arXiv 2311.16922; step
500 of 1000, drawn once per record), teacher-forced on y, at every response token t:

    kl_per_token     KL(p(. | v, y_<t) || p(. | v', y_<t))           nats per token, >= 0
    gap              sum over t of log p(y_t | v) - log p(y_t | v')  nats per response
    gap_per_token    the same / tokens of y                          nats per token
    margin_noised    log pi(chosen | v') - log pi(rejected | v')     nats
    kept_noised      share of pairs whose margin has the same sign with v as with v'
    *_auroc          of kl and gap per token: P(a real word has more than an absent one); chance 0.5

Groups: own, chosen, rejected are the tokens of those answers, end of turn included; real and absent
are object words that the facts affirm or not, each word the mean of its tokens. The gap looks at
the token that was written; the KL at the whole vocabulary, in float32, whatever was written. VCD
takes a small gap on an object word for a sign that the language prior wrote it.

Sides: base, adapted, and delta (adapted minus base). Means over answers or words, intervals over
records; the noise is the mean absolute difference between two runs of the same model (for an AUROC,
the difference of the two). Not shown: which part of the image matters, and how much a cleaner or
noisier v' would change; a model that is robust to noise has a small gap and may still look
(image_reliance has the blank and the swapped image).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes._gaps import TokenWatch, entries, preferences, spread, words_apart
from mlalign.probes._lens import Lens
from mlalign.probes._probe import FINAL, LENS, NOISED, Probe, ProbeBatch, Watch


class Settings(BaseModel):
    """No settings: the noise is fixed, so that runs compare."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def divergence(lens: Lens, seen_MD: Tensor, changed_MD: Tensor) -> Tensor:
    """(M,) float32, nats: KL between the distributions that normed last states give, in chunks."""
    parts = [
        torch.nn.functional.kl_div(q_NV, p_NV, reduction="none", log_target=True).sum(-1)
        for p_NV, q_NV in zip(
            lens.log_probs(seen_MD, normed=True),
            lens.log_probs(changed_MD, normed=True),
            strict=True,
        )
    ]
    return torch.cat(parts)


class _Contrast(TokenWatch):
    def __init__(self, batch: ProbeBatch) -> None:
        super().__init__(batch)
        self._states: dict[str, Tensor] = {}

    def final(self, view: str, states_CSD: Tensor) -> None:
        """Hold one view's states until the other's are there; then only the divergence is kept."""
        mask_CS = self.batch.rows.mask_CS
        self._states[view] = states_CSD[mask_CS]
        if len(self._states) < 2:
            return
        assert self.batch.lens is not None
        kl_M = divergence(self.batch.lens, self._states["image"], self._states[NOISED])
        table_CS = torch.zeros(mask_CS.shape, device=kl_M.device).masked_scatter(mask_CS, kl_M)
        self.tokens["kl"] = table_CS.double().cpu().numpy()
        self._states.clear()


class VcdGap(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "vcd_gap"
    prefix = "probe/vcd_gap"
    headline = "adapted"
    needs = frozenset({NOISED, FINAL, LENS})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Keeps log-probs of both views, and their divergence."""
        return _Contrast(batch)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Sums over tokens of both sides, by item."""
        assert isinstance(before, _Contrast) and isinstance(after, _Contrast)
        return entries(batch, before, after)

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Per record and over the set, by group; separation of words and margins over the set."""
        records = [value for rank in values for value in rank]
        repeats = [value for rank in noise for value in rank]
        fixed: dict[str, Any] = {"step": step, "probe": self.name}
        made = spread(fixed, "kl_per_token", records, repeats, _kl, per_token=True)
        made += spread(fixed, "gap", records, repeats, _gap, per_token=False)
        made += spread(fixed, "gap_per_token", records, repeats, _gap, per_token=True)
        made += words_apart(fixed, "kl_auroc", records, repeats, _kl)
        made += words_apart(fixed, "gap_auroc", records, repeats, _gap)
        return made + preferences(fixed, records, repeats, NOISED, "noised")


def _kl(kept: dict[str, np.ndarray]) -> np.ndarray:
    return kept["kl"]


def _gap(kept: dict[str, np.ndarray]) -> np.ndarray:
    return kept["image"] - kept[NOISED]


METHOD = VcdGap
