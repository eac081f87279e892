"""The shape of a LoRA update: its spread, its turning between passes, and intruder dimensions.

Per adapted module, dW = s B A, all read off the weights, no forward:

    stable_rank         || dW ||_F^2 / || dW ||_2^2                    1 .. r; 0 for no update
    overlap             || Q_last^T Q ||_F^2 / q                       0 .. 1, 1 = the same space
    overlap_random      q / out: the same for two random spaces        (expected)
    angle               largest principal angle between the two        degrees, 0 .. 90
    intruders           leading left singular vectors of W + dW that no left singular vector of W
                        resembles: max over j of |cos| < Settings.similarity     count, 0 .. leading
    modules_skipped     adapted modules whose intruders were not read            count

Q spans what the update writes to: the min(r, ``DIRECTIONS``) left singular vectors of dW with the
largest singular values; Q_last is that of the last pass of this tier (the first, the last and
checkpoints), so ``overlap`` is about successive checkpoints. It is NaN where there was none, or no
update. Intruder dimensions: Shuttleworth et al. arXiv 2410.21228 (there: of ten leading ones, below
0.5). They cost two singular value decompositions of a whole weight, so they are read of
``Settings.modules`` modules, evenly spaced among those whose shorter side is at most
``Settings.size``; ``modules_skipped`` counts the others.

Readings per module (group: its name inside the layer) and means over modules. The weights have no
noise (0). Everything on side "delta"; without a LoRA adapter there are no readings. What it does
not show: whether a new direction matters to any input; a DoRA magnitude or a trained bias is not in
dW.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes._neurons import base_weight, parameters_of, updates
from mlalign.probes._probe import RARE, Probe, ProbeBatch, Watch
from mlalign.probes._weights import gathered, lora_modules

DIRECTIONS = 4
"""Directions of each module that are kept for the next pass."""
METRICS = ("stable_rank", "overlap", "overlap_random", "angle", "intruders")


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    modules: int = Field(default=8, ge=0)
    """Modules whose intruder dimensions are counted."""
    size: int = Field(default=4096, ge=1)
    """Longest allowed shorter side of such a module's weight."""
    leading: int = Field(default=10, ge=1)
    """Leading singular vectors that are looked at."""
    similarity: float = Field(default=0.5, gt=0, lt=1)
    """Cosine below which a vector is an intruder."""


def update_directions(lora_b: Tensor, lora_a: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Left singular vectors (out, r) and singular values (r,) of s B A, float64, largest first.

    ``lora_b``: (out, r); ``lora_a``: (r, in). dW itself is not formed: with B = Q_b R_b and
    A^T = Q_a R_a, B A = Q_b (R_b R_a^T) Q_a^T.
    """
    basis, upper_b = torch.linalg.qr(lora_b.double())
    _, upper_a = torch.linalg.qr(lora_a.double().T, mode="r")
    left, singular, _ = torch.linalg.svd(upper_b @ upper_a.T)
    return basis @ left, singular * abs(scaling)


def stable_rank(singular: Tensor) -> float:
    """Squared Frobenius over squared spectral norm; 0 for a zero matrix."""
    largest = float(singular.max())
    return float(singular.square().sum()) / largest**2 if largest > 0 else 0.0


def between(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """(overlap, largest principal angle in degrees) of the spaces that orthonormal columns span.

    Of spaces of different dimension, the smaller one's. NaN where either is empty.
    """
    count = min(one.shape[1], other.shape[1])
    if not count:
        return float("nan"), float("nan")
    cosines = np.linalg.svd(one.T @ other, compute_uv=False)[:count].clip(0, 1)
    # The sine is exact for small angles, where the cosine rounds to 1.
    small, large = (one, other) if one.shape[1] <= other.shape[1] else (other, one)
    sines = np.linalg.svd(small - large @ (large.T @ small), compute_uv=False).clip(0, 1)
    angle = np.arctan2(sines.max(), cosines.min())
    return float(np.square(cosines).mean()), float(np.degrees(angle))


def intruders(weight: Tensor, update: Tensor, leading: int, similarity: float) -> int:
    """How many of the ``leading`` left singular vectors of W + dW are unlike all of W's.

    By eigenvectors of the smaller Gram matrix, in float64: as accurate as a singular value
    decomposition but for directions of W 1e-7 times weaker than its strongest.
    """
    before = _left(weight.double(), None)
    after = _left(weight.double() + update.double(), leading)
    return int(((after.T @ before).abs().amax(1) < similarity).sum())


def _left(matrix: Tensor, leading: int | None) -> Tensor:
    """(out, n) left singular vectors of nonzero singular values, largest first."""
    tall = matrix.shape[0] > matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = values > values.max() * 1e-14
    vectors = vectors[:, kept][:, :leading]
    return torch.nn.functional.normalize(matrix @ vectors, dim=0) if tall else vectors


class UpdateGeometry(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "update_geometry"
    prefix = "drift/update"
    headline = "delta"
    tier = RARE
    inert = frozenset({*METRICS, "modules_skipped"})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._last: dict[str, np.ndarray] = {}
        """Module -> (out, q): what its update wrote to in the last pass."""

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Sees nothing: everything is in the weights."""
        return Watch(batch)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Nothing by item."""
        return [None] * len(batch.items)

    def weights(self, vlm: VLM) -> dict[str, dict[str, float]]:
        """Module name -> metric -> number. All ranks call it; one module is whole at a time."""
        modules = lora_modules(vlm.model)
        chosen = self._chosen([(name, module) for name, module, _ in modules])
        found: dict[str, dict[str, float]] = {}
        last, self._last = self._last, {}
        for name, module, _ in modules:
            # A module with several active adapters is listed with each; its update is their sum.
            if name not in found:
                with gathered(parameters_of(module)):
                    directions, found[name] = self._of_module(module, last.get(name))
                    if name in chosen:
                        found[name]["intruders"] = self._intruders(module)
                self._last[name] = directions
        return found

    def _chosen(self, modules: list[tuple[str, Any]]) -> set[str]:
        """Evenly spaced modules that are small enough; the same ones in every pass."""
        fitting = [
            name
            for name, module in dict(modules).items()
            if min(module.in_features, module.out_features) <= self.settings.size
        ]
        count = min(self.settings.modules, len(fitting))
        return {fitting[at] for at in np.linspace(0, len(fitting) - 1, count).round().astype(int)}

    def _of_module(
        self, module: Any, last: np.ndarray | None
    ) -> tuple[np.ndarray, dict[str, float]]:
        parts = updates(module)
        lora_b = torch.cat([up * scaling for up, _, scaling in parts], dim=1)
        lora_a = torch.cat([down for _, down, _ in parts], dim=0)
        left, singular = update_directions(lora_b, lora_a, 1.0)
        real = int((singular > singular.max() * 1e-6).sum()) if singular.max() > 0 else 0
        kept = left[:, : min(real, DIRECTIONS)].float().cpu().numpy()
        overlap, angle = between(last, kept) if last is not None else (float("nan"),) * 2
        larger = max(kept.shape[1], 0 if last is None else last.shape[1])
        known = not np.isnan(overlap)
        return kept, {
            "stable_rank": stable_rank(singular),
            "overlap": overlap,
            "overlap_random": larger / len(kept) if known else float("nan"),
            "angle": angle,
        }

    def _intruders(self, module: Any) -> float:
        update = sum(
            (scaling * (up @ down) for up, down, scaling in updates(module)),
            torch.zeros(()),
        )
        assert isinstance(update, Tensor)
        weight = base_weight(module).to(update.device)
        return float(intruders(weight, update, self.settings.leading, self.settings.similarity))

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """By module, and means over the modules that have the number."""
        fixed: dict[str, Any] = {"step": step, "probe": self.name, "side": "delta", "record": ""}
        made = []
        for name, numbers in weights.items():
            at = re.search(r"layers\.(\d+)\.(.+)$", name)
            layer, group = (int(at[1]), at[2]) if at else (-1, name)
            for metric, value in numbers.items():
                made.append(
                    ProbeReading(
                        metric=metric, layer=layer, group=group, value=value, noise=0.0, **fixed
                    )
                )
        if not weights:
            return []
        for metric in METRICS:
            each = [n[metric] for n in weights.values() if np.isfinite(n.get(metric, np.nan))]
            mean = float(np.mean(each)) if each else float("nan")
            made.append(ProbeReading(metric=metric, value=mean, noise=0.0, n=len(each), **fixed))
        skipped = sum("intruders" not in numbers for numbers in weights.values())
        made.append(
            ProbeReading(metric="modules_skipped", value=float(skipped), n=len(weights), **fixed)
        )
        return made

    def remember(self) -> dict[str, np.ndarray]:
        """What every module's update writes to: out x 4 numbers a module."""
        return dict(self._last)

    def recall(self, kept: dict[str, np.ndarray]) -> None:
        """Take it back."""
        self._last = dict(kept)


METHOD = UpdateGeometry
