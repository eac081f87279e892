"""What a probe is, and what it is shown: batches of the probe set and the forwards over them.

A probe declares what it ``needs`` and gives out one ``Watch`` per batch and side (base, adapted).
The pass (``_pass.py``) runs each forward once and shows it to every watch; the probe then compares
the two sides record by record, and turns what all ranks gathered into readings. Probes never run
a forward of their own and never communicate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mlalign.branching.batch import PREFIX, PrefixBatch, ProbeReading, TokenLogps
from mlalign.models._family import ImageInputs
from mlalign.models._vlm import VLM
from mlalign.probes._lens import Lens
from mlalign.probes._records import Mention, ProbeRecord

ATTENTION = "attention"
"""Attention rows that produce the response tokens."""
PROMPT_ATTENTION = "prompt_attention"
"""Attention rows of the prefix tokens that follow the image (the question), and of no others."""
HIDDEN = "hidden"
"""MLP gate, neuron coefficients and block output of every decoder block."""
BLANK = "blank"
"""Log-probs with the image blanked: pixels of the processor's mean colour."""
SWAPPED = "swapped"
"""Log-probs with another record's image; no such view where the set has one image only."""
NOISED = "noised"
"""Log-probs with the image under diffusion noise (``branching/views.py``, step 500 of 1000)."""
KNOCKOUTS = ("knockout.early", "knockout.middle", "knockout.late", "knockout.all")
"""Log-probs with the image columns hidden from all other rows, in a third of the blocks or all."""
FINAL = "final"
"""Last hidden states, after the final norm, of the rows that produce response tokens."""
GRADIENT = "gradient"
"""Gradient of each completion's summed log-prob with respect to the input embeddings."""
LENS = "lens"
"""The final norm and the head, whole on every rank, as ``ProbeBatch.lens``."""

EVERY, RARE = "every", "rare"
"""Tiers. A probe of ``RARE`` runs in the first pass, the last, and those at checkpoints."""

GROUPS = ("image", "prompt", "response")
"""Token groups of a row."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A probe record made ready for the model."""

    index: int
    """Number of the record in the whole probe set."""
    record: ProbeRecord
    prefix: list[int]
    completions: list[list[int]]
    """Token ids in the order of ``COMPLETIONS``, end of turn included."""
    image: ImageInputs
    """The record's own image."""
    swapped: ImageInputs | None = None
    """The next record's image that is another one; None where there is none, or nobody needs it."""
    noised: ImageInputs | None = None
    """The record's image under diffusion noise; None where nobody needs it."""
    mentions: tuple[tuple[Mention, ...], ...]
    """Object words of each completion."""
    boxes: dict[str, Tensor]
    """Object name -> bool (P,): image tokens inside its boxes; only names with a visible box."""


@dataclass(kw_only=True)
class ProbeBatch:
    """Items as rows, on the model's device; the pixels of ``rows`` may stay on the CPU."""

    items: list[Item]
    rows: PrefixBatch
    image_RT: Tensor
    """bool, on the CPU; image tokens."""
    lens: Lens | None = None
    """Where a running probe needs ``LENS``, and only during a pass: it is as large as the head."""
    attention: str = "auto"
    """How its rows attend (``branching.attention.choose``)."""

    def queries(self, row: int) -> list[Tensor]:
        """For each completion, the positions whose rows produce its tokens (t - 1, not t)."""
        chosen = (self.rows.row_C == row).nonzero()[:, 0].tolist()
        return [self.rows.source_CS[c][self.rows.mask_CS[c]].cpu() for c in chosen]

    def after_image(self, row: int) -> Tensor:
        """int64; positions of the prefix tokens after the last image token, in order."""
        prefix_T = self.rows.segment_RT[row].cpu() == PREFIX
        later_T = self.image_RT[row].flip(0).cumsum(0).flip(0) == 0
        return (prefix_T & later_T).nonzero()[:, 0]

    def groups(self, row: int) -> dict[str, Tensor]:
        """Positions of the row's image, prompt and response tokens; padding is in none."""
        segment_T = self.rows.segment_RT[row].cpu()
        image_T = self.image_RT[row]
        masks = (image_T, (segment_T == PREFIX) & ~image_T, segment_T > PREFIX)
        return {name: mask.nonzero()[:, 0] for name, mask in zip(GROUPS, masks, strict=True)}

    def length(self, row: int) -> int:
        """Tokens of the row without its padded tail."""
        return int((self.rows.segment_RT[row] >= PREFIX).sum())


class Watch:
    """Sees one side's forwards of one batch; keeps, by item index, what its probe needs."""

    def __init__(self, batch: ProbeBatch) -> None:
        self.batch = batch

    def attention(self, layer: int, row: int, weights_HQT: Tensor) -> None:
        """Rows of one block and batch row; Q runs over the completions' tokens, in order."""

    def prompt_attention(self, layer: int, row: int, weights_HQT: Tensor) -> None:
        """Rows of one block and batch row; Q runs over ``batch.after_image(row)``."""

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        """``kind``: "gate" (gate_proj output), "coefficient" (down_proj input), "residual"."""

    def logps(self, view: str, logps: TokenLogps) -> None:
        """``view``: "image", or one of the views that the probe needs; they may be NaN."""

    def final(self, view: str, states_CSD: Tensor) -> None:
        """Normed last states at ``rows.source_CS``, meaningless where ``rows.mask_CS`` is False.

        For "image" and for each view that the probe needs; only with the need ``FINAL``.
        """

    def gradient(self, completion: int, inputs_RTD: Tensor, gradients_RTD: Tensor) -> None:
        """Input embeddings, and d(sum of the log-probs of every row's completion)/d(them).

        ``completion``: number among ``COMPLETIONS``. Rows do not mix, so each row holds its own.
        Image features are in the embeddings; what a family adds to later blocks (deepstack) is not.
        """


class Probe:
    """Base of the probes. Subclasses set the class attributes and fill in the methods."""

    name: str
    """File name."""
    prefix: str
    """What its metrics begin with."""
    headline: str
    """The side whose means carry no suffix in the metrics: "adapted" or "delta"."""
    needs: frozenset[str] = frozenset()
    tier: str = EVERY
    """``EVERY`` or ``RARE``."""
    inert: frozenset[str] = frozenset()
    """Metrics that no activation enters (counts, norms of weights): the pass leaves them as they
    are where activations are not finite, and makes the others NaN."""

    def prepare(self, vlm: VLM) -> None:
        """Called once, before the first pass: refuse here what cannot be probed."""

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """A fresh watch for one batch and side."""
        raise NotImplementedError

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """One value per item, from two sides. Plain Python and numpy: it is pickled."""
        raise NotImplementedError

    def condense(self, values: list[Any]) -> Any:
        """One rank's values made small before they are gathered."""
        return values

    def weights(self, vlm: VLM) -> Any:
        """What is read off the weights; every rank calls it, so it may gather them."""
        return None

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Readings of the whole set. ``values``, ``noise``: ``condense`` of every rank in order."""
        raise NotImplementedError

    def remember(self) -> dict[str, np.ndarray]:
        """What the next pass needs of this one, kept beside the readings for a resumed run."""
        return {}

    def recall(self, kept: dict[str, np.ndarray]) -> None:
        """Take back what ``remember`` gave in the last pass before a run was resumed."""

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Further tables of the last ``readings``, by file name (attention maps)."""
        return {}


def means(probes: Sequence[Probe], readings: Sequence[ProbeReading]) -> dict[str, float]:
    """Scalars for metrics.jsonl: readings over the whole set, all layers, heads and neurons.

    Named <prefix>/<metric>, then /<group> where there is one, then /base, /delta or /adapted where
    it is not the probe's headline side. A floor stands beside them as .../noise.
    """
    by_name = {probe.name: probe for probe in probes}
    scalars: dict[str, float] = {}
    for reading in readings:
        if reading.record or max(reading.layer, reading.head, reading.neuron) >= 0:
            continue
        probe = by_name[reading.probe]
        parts = [probe.prefix, reading.metric]
        parts += [reading.group] if reading.group else []
        parts += [reading.side] if reading.side != probe.headline else []
        key = "/".join(parts)
        if key in scalars:
            raise ValueError(f"{key} was read twice in one pass")
        scalars[key] = reading.value
        if math.isfinite(reading.noise):
            scalars[f"{key}/noise"] = reading.noise
    return scalars
