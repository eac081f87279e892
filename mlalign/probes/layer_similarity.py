"""Which layer of the adapted model resembles which of the base, and where the common shift points.

States are outputs of ``Settings.layers`` decoder blocks, evenly spaced with the first and the last.

    cka                debiased linear CKA of base and adapted states, same layer     1 = same shape
    cka_elsewhere      mean CKA with the other layers: what CKA near 1 must exceed
    depth_shift        mean over base layers of (best matching adapted layer - layer)   in layers;
                       0: every layer still resembles itself most
    offset_cosine      cos(offset, behaviour direction)                               -1 .. 1
    offset_gaps        (offset . direction) / || gap ||    in real-minus-absent gaps
    offset_cosine_shuffled   cos with directions whose records have real and absent exchanged at
                       random: mean, lo and hi 2.5 and 97.5 %

The table ``layer_cka`` holds the whole matrix (step, group, layer_base, layer_adapted, value,
base_value): base_value is the same of the base with itself. CKA is read by token group, from
``Settings.tokens`` evenly spaced tokens of each record (Kornblith et al. arXiv 1905.00414, unbiased
estimate of Song et al. 2012). offset = mean over answer tokens and records of h_adapted - h_base
(Lee et al. arXiv 2401.01967). The behaviour direction is, in the base model, the mean state at the
last token of real object words minus that at absent ones, within each record and then over the
records that have both: the model has just read the word. A positive offset moves towards states
after words that are true of the image. Side "delta".

lo and hi: for CKA a jackknife over blocks of records (``_sets.py``), for the offset a bootstrap
over records. The noise is the same statistic between two runs of the same model; CKA has none where
the first batch gives fewer than four states. n: states, or records with both kinds of words. What
it does not show: that moving along the direction changes answers; and a CKA of 1 is also that of
states that all shifted alike (``offset`` in neuron_drift.py). Real and absent words differ as words
too, which the shuffled directions do not remove where a set has the same few words throughout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes import _sets
from mlalign.probes._behaviour import Shift, offset_estimates, word_positions
from mlalign.probes._probe import GROUPS, HIDDEN, RARE, Probe, ProbeBatch, Watch
from mlalign.probes._sets import Key
from mlalign.probes._stats import debiased_cka


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    layers: int = Field(default=12, ge=1)
    """Blocks that are compared."""
    tokens: int = Field(default=2, ge=1)
    """Tokens of each record and group that enter the CKA."""


class _States(Watch):
    """What is kept of the chosen blocks' outputs, on the CPU in float32."""

    def __init__(self, batch: ProbeBatch, layers: list[int], tokens: int) -> None:
        super().__init__(batch)
        self._layers = set(layers)
        self._index: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        """By row: spaced tokens, answer tokens, last tokens of real and of absent words."""
        for row in range(len(batch.items)):
            groups = batch.groups(row)
            spaced = torch.cat([_spaced(groups[group], tokens) for group in GROUPS])
            words = word_positions(batch, row)
            self._index.append((spaced, groups["response"], *words))
        self.held: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}
        """(item index, layer) -> spaced states; means at answer tokens, real and absent words."""

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        """Keep spaced states and three means."""
        if kind != "residual" or layer not in self._layers:
            return
        for row, item in enumerate(self.batch.items):
            spaced, *means = (
                states_RTD[row, index.to(states_RTD.device)].float() for index in self._index[row]
            )
            kept = [spaced, *(each.mean(0) for each in means)]
            self.held[item.index, layer] = tuple(each.cpu().numpy() for each in kept)


def _spaced(positions: Tensor, count: int) -> Tensor:
    """Exactly ``count`` of them, evenly spaced; repeated where there are fewer."""
    if not len(positions):
        return positions
    return positions[np.linspace(0, len(positions) - 1, count).round().astype(int)]


class LayerSimilarity(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "layer_similarity"
    prefix = "drift/layers"
    headline = "delta"
    needs = frozenset({HIDDEN})
    tier = RARE

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._layers: list[int] = []
        self._rows: list[dict[str, Any]] = []

    def prepare(self, vlm: VLM) -> None:
        """Choose the blocks."""
        count = len(vlm.layers)
        spaced = np.linspace(0, count - 1, min(self.settings.layers, count)).round().astype(int)
        self._layers = spaced.tolist()

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Keeps the states of one batch."""
        return _States(batch, self._layers, self.settings.tokens)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """States and means of both sides, by item."""
        assert isinstance(before, _States) and isinstance(after, _States)
        values = []
        for row, item in enumerate(batch.items):
            old, new = (
                [watch.held[item.index, layer] for layer in self._layers]
                for watch in (before, after)
            )
            sizes = [min(len(batch.groups(row)[g]), 1) * self.settings.tokens for g in GROUPS]
            cuts = np.cumsum(sizes)[:-1]
            values.append(
                {
                    "index": item.index,
                    "states": {
                        side: dict(
                            zip(
                                GROUPS,
                                np.split(np.stack([each[0] for each in held]), cuts, axis=1),
                                strict=True,
                            )
                        )
                        for side, held in (("base", old), ("adapted", new))
                    },
                    "shift": Shift(
                        moved_LD=np.stack([b[1] - a[1] for a, b in zip(old, new, strict=True)]),
                        gap_LD=np.stack([each[2] - each[3] for each in old]),
                    ),
                }
            )
        return values

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """CKA by layer and group, and the offset's direction by layer; sets the table."""
        records = sorted((v for rank in values for v in rank), key=lambda v: v["index"])
        repeats = [v for rank in noise for v in rank]
        fixed: dict[str, Any] = {"step": step, "probe": self.name, "side": "delta"}
        made: list[ProbeReading] = []
        self._rows = []
        for group in GROUPS:
            states = _blocks(records, group)
            matrix, reference = _matrix(states, "adapted"), _matrix(states, "base")
            found = _sets.jackknife(lambda part, g=group: self._similarity(part, g), states)
            floor = self._similarity(_blocks(repeats, group), group) if repeats else {}
            count = sum(block["base"].shape[1] for block in states)
            made += _sets.to_readings(found, noise=floor, n=count, **fixed)
            self._rows += [
                {
                    "step": step,
                    "group": group,
                    "layer_base": one,
                    "layer_adapted": other,
                    "value": float(matrix[i, j]),
                    "base_value": float(reference[i, j]),
                }
                for i, one in enumerate(self._layers)
                for j, other in enumerate(self._layers)
            ]
        shifts = offset_estimates([v["shift"] for v in records], self._layers)
        floors = offset_estimates([v["shift"] for v in repeats], self._layers)
        floor = {key: each.value for key, each in floors.items() if "shuffled" not in key[0]}
        return made + _sets.to_readings(shifts, noise=floor, n=0, **fixed)

    def _similarity(self, blocks: list[Any], group: str) -> dict[Key, float]:
        matrix = _matrix(blocks, "adapted")
        own = np.diag(matrix)
        others = matrix[~np.eye(len(matrix), dtype=bool)]
        whole = bool(np.isfinite(matrix).all())
        best = np.array(self._layers)[matrix.argmax(1)] if whole else np.nan
        made: dict[Key, float] = {
            ("cka", group, -1): float(own.mean()),
            ("cka_elsewhere", group, -1): float(others.mean()) if len(others) else float("nan"),
            ("depth_shift", group, -1): float(np.mean(best - np.array(self._layers))),
        }
        return made | {
            ("cka", group, layer): float(value)
            for layer, value in zip(self._layers, own, strict=True)
        }

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """The matrices."""
        return {"layer_cka": self._rows}


def _blocks(records: list[Any], group: str) -> list[dict[str, np.ndarray]]:
    """By block of records: side -> (layers, states, n): the states in a basis of their own span.

    CKA depends on inner products alone, so that the basis changes nothing but the width.
    """
    blocks = _sets.in_blocks([(v["index"], v["states"]) for v in records])
    numbers = sorted(blocks)
    made: list[dict[str, np.ndarray]] = [{} for _ in numbers]
    for side in ("base", "adapted"):
        parts = [np.concatenate([v[side][group] for v in blocks[n]], axis=1) for n in numbers]
        whole = np.concatenate(parts, axis=1).astype(np.float64)
        whole -= whole.mean(1, keepdims=True)
        if np.isfinite(whole).all():
            left, singular, _ = np.linalg.svd(whole, full_matrices=False)
            whole = left * singular[:, None, :]
        cuts = np.cumsum([part.shape[1] for part in parts])[:-1]
        for into, part in zip(made, np.split(whole, cuts, axis=1), strict=True):
            into[side] = part
    return made


def _matrix(blocks: list[dict[str, np.ndarray]], side: str) -> np.ndarray:
    """(layers, layers): CKA of the base with ``side``, over the states of these blocks."""
    old, new = (np.concatenate([b[s] for b in blocks], axis=1) for s in ("base", side))
    return np.array([[debiased_cka(one, other) for other in new] for one in old])


METHOD = LayerSimilarity
