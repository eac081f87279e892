"""Image tokens that soak up attention without carrying the image, and what is left for the others.

A sink token has a massive activation: one of a few dimensions, the sink dimensions, holds a large
part of its hidden state. With x_j the state of token j that enters block l (what its attention
reads), D_l the sink dimensions of l, A the rows that produce response tokens (row t - 1 for the
token at t; mean over heads), I the image tokens and S those of them that are sinks:

    phi_j          max over d in D_l of x_j[d]^2 / sum over d of x_j[d]^2   energy share, 0..1
    S              { j in I : phi_j >= energy }
    sink_tokens    |S| / |I|                                                share of image tokens
    sink_tokens_random   the same with as many other dimensions, drawn once   control
    first_energy   phi of the row's first token                             0..1
    sink_mass      sum over S of A                                          share, 0..1
    nonsink_mass   sum over I without S of A                                share, 0..1
    sink_lift      sink_mass / (sink_mass + nonsink_mass) / sink_tokens     chance = 1

arXiv 2503.03321 (See What You Are Told) has max |x[d]| / rms(x) >= 20 and names the dimensions of
LLaMA-2-7B, 1415 and 2533. A ratio of 20 at its width, 4096, is an energy share of 400 / 4096,
which carries over to other widths (a ratio of 20 cannot be reached below width 400). For any model
D_l is found here: the ``count`` dimensions that hold most of the base model's first token at the
entrance of block l. That token is the same in every record and sees nothing else, and it is a sink
itself where the model has sinks. D_l is fixed in the first pass, so base and adapted are judged by
the same dimensions at every step.

Block 0 reads embeddings, which are not watched: readings begin at layer 1. ``sink_lift`` is left
out where a record has no sink; a random set of image tokens of the same size has lift 1. The
energy must be high (``first_energy`` near 1) for the word sink to fit: a small model may have none.
Groups: "image" for the tokens; "response", every token of the three answers, "real" and "absent"
object words for the masses; ``nonsink_mass_auroc`` parts these (chance 0.5). Does not show that a
sink is useless here: the paper's evidence is that removing sinks does not hurt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mlalign.models._vlm import VLM
from mlalign.probes._attention_rows import ROWS, RowProbe, RowWatch
from mlalign.probes._probe import ATTENTION, HIDDEN, ProbeBatch, Watch

TOKENS = ("sink_tokens", "sink_tokens_random", "first_energy")
MASSES = ("sink_mass", "nonsink_mass", "sink_lift")
IMAGE = "image"


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    energy: float = Field(default=20**2 / 4096, gt=0, le=1)
    """Share of a token's squared norm that one sink dimension must hold. The default is the
    paper's ratio to the root mean square, 20, at LLaMA-2-7B's width."""
    count: int = Field(default=2, ge=1)
    """Sink dimensions to find in each layer."""
    dims: tuple[int, ...] | None = None
    """Sink dimensions where they are known, for every layer; None: found."""


def energies(states_TD: Tensor) -> Tensor:
    """(T, D) float32: share of each dimension in a token's squared norm; rows sum to 1."""
    squares_TD = states_TD.float().square()
    return squares_TD / squares_TD.sum(-1, keepdim=True).clamp_min(1e-30)


def sink_dims(first_D: Tensor, count: int) -> Tensor:
    """(count,) int64: the dimensions that hold most of the first token, in rising order."""
    return energies(first_D[None])[0].topk(count).indices.sort().values


def sink_masses(weights_HQT: Tensor, image_T: Tensor, sink_T: Tensor) -> Tensor:
    """(len(MASSES), H, Q); ``sink_T``: the image tokens that are sinks. No sinks: no lift."""
    sink_HQ = weights_HQT[..., sink_T].sum(-1)
    rest_HQ = weights_HQT[..., image_T & ~sink_T].sum(-1)
    lift_HQ = sink_HQ / (sink_HQ + rest_HQ).clamp_min(1e-30) / (sink_T.sum() / image_T.sum())
    return torch.stack([sink_HQ, rest_HQ, torch.where(sink_T.any(), lift_HQ, float("nan"))])


class _Sinks(RowWatch):
    def __init__(self, batch: ProbeBatch, probe: AttentionSinks) -> None:
        super().__init__(batch, probe)
        self.own = probe
        self._sinks: dict[tuple[int, int], Tensor] = {}
        """(layer, row of the batch) -> bool (T,): sinks at the entrance of that layer."""

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        """Find the sinks among the states that enter the next block."""
        entered = layer + 1
        if kind != "residual" or entered >= self.probe.layers:
            return
        dims, control = self.own.dims_of(entered, states_RTD[0, 0])
        for row in range(len(self.batch.items)):
            image_T = self.batch.image_RT[row].to(states_RTD.device)
            share_TD = energies(states_RTD[row])
            found = [
                share_TD[:, each].max(-1).values >= self.own.settings.energy
                for each in (dims, control)
            ]
            self._sinks[entered, row] = found[0] & image_T
            values = [each[image_T].float().mean() for each in found]
            values.append(share_TD[0, dims].max())
            sums_MH = np.zeros((len(self.probe.metrics), 1), np.float32)
            sums_MH[: len(TOKENS), 0] = torch.stack(values).cpu().numpy()
            counts_M = np.zeros(len(self.probe.metrics), np.float32)
            counts_M[: len(TOKENS)] = 1
            self.add(row, entered, IMAGE, sums_MH, counts_M)

    def read(self, layer: int, row: int, weights_HQT: Tensor) -> Tensor | None:
        """(metrics, H, Q); None for the first block, whose input is not watched."""
        if (layer, row) not in self._sinks:
            return None
        image_T = self.batch.image_RT[row].to(weights_HQT.device)
        masses_MHQ = sink_masses(weights_HQT, image_T, self._sinks.pop((layer, row)))
        nothing = masses_MHQ.new_full((len(TOKENS), *masses_MHQ.shape[1:]), float("nan"))
        return torch.cat([nothing, masses_MHQ])


class AttentionSinks(RowProbe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "attention_sinks"
    needs = frozenset({ATTENTION, HIDDEN})
    metrics = (*TOKENS, *MASSES)
    separates = ("nonsink_mass",)

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._dims: dict[int, list[int]] = {}
        """Layer -> sink dimensions, from the first forward, which is the base model's."""

    def prepare(self, vlm: VLM) -> None:
        """Refuse attention that cannot be read row by row, rows without a first text token, and
        dimensions that the model does not have."""
        super().prepare(vlm)
        width = vlm.core.config.get_text_config().hidden_size
        first = vlm.prefix_ids("-", (64, 64))[0]
        if self.settings.dims is None and first == vlm.image_token_id:
            raise ValueError(
                f"attention_sinks: rows of {vlm.name or 'the model'} begin with an image token: no "
                "first text token finds its sink dimensions. Set dims"
            )
        wanted = self.settings.dims or ()
        if any(not 0 <= d < width for d in wanted) or 2 * max(self.settings.count, 1) > width:
            raise ValueError(
                f"attention_sinks: dims {list(wanted)} or count {self.settings.count} do not fit "
                f"the model's width, {width}"
            )

    def groups(self, metric: str) -> tuple[str, ...]:
        """Image tokens, or the rows that look at them."""
        return (IMAGE,) if metric in TOKENS else ROWS

    def dims_of(self, layer: int, first_D: Tensor) -> tuple[Tensor, Tensor]:
        """Sink dimensions of a layer, and as many others. ``first_D``: used the first time only."""
        if layer not in self._dims:
            known = self.settings.dims
            found = sink_dims(first_D, self.settings.count).tolist() if known is None else known
            self._dims[layer] = list(found)
        dims = self._dims[layer]
        others = np.setdiff1d(np.arange(len(first_D)), dims)
        control = np.random.default_rng(layer).choice(others, len(dims), replace=False)
        device = first_D.device
        return torch.tensor(dims, device=device), torch.tensor(control, device=device)

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Marks sinks and sums attention rows as they come."""
        return _Sinks(batch, self)

    def remember(self) -> dict[str, np.ndarray]:
        """The sink dimensions of every layer."""
        return {"dims": np.array([[layer, *dims] for layer, dims in sorted(self._dims.items())])}

    def recall(self, kept: dict[str, np.ndarray]) -> None:
        """Go on with the sink dimensions of the first pass."""
        self._dims = {int(row[0]): [int(d) for d in row[1:]] for row in kept["dims"]}

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """attention_sink_dims: what was found in the first pass."""
        return {
            "attention_sink_dims": [
                {"layer": layer, "dims": list(dims)} for layer, dims in sorted(self._dims.items())
            ]
        }


METHOD = AttentionSinks
