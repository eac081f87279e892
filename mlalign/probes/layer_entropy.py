"""How sure the residual stream is of the next word, block by block: entropy of the logit lens.

    entropy(l) = mean over tokens of H(softmax(W_U norm(h_l)))     nats, 0 .. log V

h_l is the output of decoder block l. Over evenly spaced image tokens ("image") and over evenly
spaced rows that produce response tokens ("response": row t - 1 for the token at t) of all three
answers. MMNeuron (Huo et al., arXiv 2406.11193) reads three stages off the curve over image
tokens: features aligned with words, features worked on, a response prepared. At the last block
the lens is the model itself, so there "response" is the entropy of what the model answers.

Means over tokens of all records with 95 % intervals over records; layer -1 is the mean over the
blocks. Sides "base", "adapted" and "delta"; the floor of "delta" is the mean absolute difference
between two runs of the same model. Cost: tokens * D * V * 2 FLOPs a block; with the defaults 1.5 %
of a forward of LLaVA-1.5-7B over 700 tokens.

Not shown: that the block uses these words. The lens reads early blocks in the last block's basis,
and a high entropy may mean that the state is not written in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes._lens import Lens
from mlalign.probes._probe import HIDDEN, LENS, Probe, ProbeBatch, Watch
from mlalign.probes._summaries import side_means

READ = ("image", "response")


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    image_tokens: int = Field(default=8, ge=1)
    """Image tokens of each record that are read."""
    response_tokens: int = Field(default=8, ge=1)
    """Rows of each record's answers that are read."""


def entropies(lens: Lens, states_ND: Tensor) -> Tensor:
    """(N,) nats: entropy of each state's lens distribution."""
    parts = [
        torch.special.entr(log_probs_NV.exp()).sum(-1) for log_probs_NV in lens.log_probs(states_ND)
    ]
    return torch.cat(parts) if parts else states_ND.new_zeros(0, dtype=torch.float32)


def spaced(positions: Tensor, count: int) -> Tensor:
    """At most ``count`` of the positions, evenly spaced, ends included; always the same ones."""
    places = np.linspace(0, len(positions) - 1, min(count, len(positions))).round().astype(int)
    return positions[torch.as_tensor(places, dtype=torch.long)]


class _Entropy(Watch):
    def __init__(self, batch: ProbeBatch, settings: Settings) -> None:
        super().__init__(batch)
        self._rows = [
            {
                "image": spaced(batch.groups(row)["image"], settings.image_tokens),
                "response": spaced(torch.cat(batch.queries(row)), settings.response_tokens),
            }
            for row in range(len(batch.items))
        ]
        self.counts = {
            item.index: {group: len(at) for group, at in rows.items()}
            for item, rows in zip(batch.items, self._rows, strict=True)
        }
        self.sums: dict[int, dict[tuple[int, str], float]] = {i.index: {} for i in batch.items}
        """Item index -> (layer, group) -> sum over its tokens."""

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        """Entropies of the block's output at the chosen tokens, summed."""
        if kind != "residual":
            return
        lens = self.batch.lens
        assert lens is not None, "the pass delivers the lens to a probe that needs it"
        for row, item in enumerate(self.batch.items):
            for group, at in self._rows[row].items():
                states_ND = states_RTD[row, at.to(states_RTD.device)]
                total = entropies(lens, states_ND).double().sum()
                self.sums[item.index][layer, group] = float(total)


class LayerEntropy(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "layer_entropy"
    prefix = "probe/layer_entropy"
    headline = "adapted"
    needs = frozenset({HIDDEN, LENS})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Reduces every block's output as it comes."""
        return _Entropy(batch, self.settings)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Sums over tokens of both sides, by item."""
        assert isinstance(before, _Entropy) and isinstance(after, _Entropy)
        return [
            {
                "id": item.record.id,
                "counts": after.counts[item.index],
                "base": before.sums[item.index],
                "adapted": after.sums[item.index],
            }
            for item in batch.items
        ]

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Per record and block; over the set per block, and over the blocks' mean."""
        records = [record for rank in values for record in rank]
        repeats = [record for rank in noise for record in rank]
        layers = [-1, *sorted({layer for layer, _ in records[0]["adapted"]})]
        ids = [record["id"] for record in records]
        made = []
        for group in READ:
            fixed = {"step": step, "probe": self.name, "metric": "entropy", "group": group}
            sums, counts = _stacked(records, group, layers)
            repeat = _stacked(repeats, group, layers)
            made += side_means(fixed, layers, ids, sums, counts, repeat)
        return made


def _stacked(
    records: list[Any], group: str, layers: list[int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Side -> (N, layers), the first column the blocks' mean; and the counts (N,)."""
    sums = {}
    for side in ("base", "adapted"):
        by_layer = [[record[side][layer, group] for layer in layers[1:]] for record in records]
        table_NL = np.array(by_layer).reshape(len(records), len(layers) - 1)
        sums[side] = np.concatenate([table_NL.mean(1, keepdims=True), table_NL], 1)
    return sums, np.array([record["counts"][group] for record in records])


METHOD = LayerEntropy
