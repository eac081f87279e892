"""Attention rows reduced to sums while they appear: what the grounding probes share.

A probe turns the rows of one block into values (metrics, heads, rows); here these are summed over
groups of rows: "response", every token of the three answers, and "real" and "absent", the tokens of
object words that the facts affirm or not (a word counts once: the mean of its tokens). NaN means
that a metric is not defined at a row; such rows are left out and not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlalign.branching.attention import refuse
from mlalign.branching.batch import PREFIX, ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes import _row_readings
from mlalign.probes._probe import ATTENTION, Item, Probe, ProbeBatch, Watch
from mlalign.probes._records import Mention

RESPONSE, REAL, ABSENT = "response", "real", "absent"
WORDS = (REAL, ABSENT)
ROWS = (RESPONSE, *WORDS)


@dataclass
class RowSums:
    """What one side's attention was for one item."""

    sums: dict[str, np.ndarray] = field(default_factory=dict)
    """Group -> (L, M, H) float32, sum over the group's rows or words; H is 1 without heads."""
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    """Group -> (L, M), how many rows or words were summed."""
    words: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0, 0), np.float32))
    """(words, L, kept metrics, H) float32, NaN where not defined."""


def words_of(item: Item) -> Iterator[tuple[int, Mention]]:
    """(number of the completion, object word) in a fixed order."""
    for completion, each in enumerate(item.mentions):
        for mention in each:
            yield completion, mention


def reduce_rows(values_MHQ: Tensor, member_GQ: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(G, M, H) sums and (G, M) counts of the rows in each group, rows with a NaN left out.

    ``member_GQ``: 1 where a row belongs to the group, else 0.
    """
    whole_MQ = ~values_MHQ.isnan().any(1)
    kept_MHQ = torch.where(whole_MQ[:, None], values_MHQ, 0.0)
    # Products of matrices could be rounded to TF32 on a GPU; sums are not.
    sums_GMH = (kept_MHQ * member_GQ[:, None, None]).sum(-1)
    counts_GM = (whole_MQ * member_GQ[:, None]).sum(-1)
    return sums_GMH.cpu().numpy(), counts_GM.cpu().numpy()


class RowWatch(Watch):
    """Sums what ``read`` makes of every block's rows."""

    def __init__(self, batch: ProbeBatch, probe: RowProbe) -> None:
        super().__init__(batch)
        self.probe = probe
        self.sides = {item.index: RowSums() for item in batch.items}
        self.starts: list[list[int]] = []
        """Per row of the batch: where each completion's tokens begin among the rows handed out."""
        self._members: list[Tensor] = []
        for row, item in enumerate(batch.items):
            lengths = [len(each) for each in batch.queries(row)]
            self.starts.append(np.cumsum([0, *lengths[:-1]]).tolist())
            member_GQ = torch.zeros(1 + sum(1 for _ in words_of(item)), sum(lengths))
            member_GQ[0] = 1
            for number, (completion, mention) in enumerate(words_of(item), start=1):
                tokens = [self.starts[row][completion] + t for t in mention.tokens]
                member_GQ[number, tokens] = 1
            self._members.append(member_GQ)

    def read(self, layer: int, row: int, weights_HQT: Tensor) -> Tensor | None:
        """(metrics, H, Q), NaN where not defined; None where the layer is not read."""
        raise NotImplementedError

    def attention(self, layer: int, row: int, weights_HQT: Tensor) -> None:
        """Sum one block's rows over the response and over its object words."""
        values_MHQ = self.read(layer, row, weights_HQT)
        if values_MHQ is None:
            return
        if not self.probe.heads:
            values_MHQ = values_MHQ.mean(1, keepdim=True)
        member_GQ = self._members[row].to(values_MHQ.device)
        sums_GMH, counts_GM = reduce_rows(values_MHQ, member_GQ)
        self.add(row, layer, RESPONSE, sums_GMH[0], counts_GM[0])
        with np.errstate(invalid="ignore", divide="ignore"):
            self.add_words(row, layer, sums_GMH[1:] / counts_GM[1:, :, None])

    def add(
        self, row: int, layer: int, group: str, sums_MH: np.ndarray, counts_M: np.ndarray
    ) -> None:
        """Add to one group's sums."""
        side = self.sides[self.batch.items[row].index]
        if group not in side.sums:
            shape = (self.probe.layers, *sums_MH.shape)
            side.sums[group] = np.zeros(shape, np.float32)
            side.counts[group] = np.zeros(shape[:2], np.float32)
        side.sums[group][layer] += sums_MH
        side.counts[group][layer] += counts_M

    def add_words(self, row: int, layer: int, means_WMH: np.ndarray) -> None:
        """Add each word's mean over its tokens (NaN: not defined) to "real" and "absent"."""
        item = self.batch.items[row]
        real_W = np.array([mention.real for _, mention in words_of(item)], dtype=bool)
        defined_WM = np.logical_not(np.isnan(means_WMH).any(-1))
        kept_WMH = np.where(defined_WM[..., None], means_WMH, 0)
        for group, chosen_W in ((REAL, real_W), (ABSENT, ~real_W)):
            self.add(row, layer, group, kept_WMH[chosen_W].sum(0), defined_WM[chosen_W].sum(0))
        side = self.sides[item.index]
        kept = [self.probe.metrics.index(name) for name in self.probe.separates]
        kept_WSH = means_WMH[:, kept]
        if not self.probe.separate_heads:
            kept_WSH = kept_WSH.mean(-1, keepdims=True)
        if not side.words.size:
            shape = (len(real_W), self.probe.layers, *kept_WSH.shape[1:])
            side.words = np.full(shape, np.nan, np.float32)
        side.words[:, layer] = kept_WSH


class RowProbe(Probe):
    """Base of the grounding probes: what they read is the mean of row statistics over groups."""

    prefix = "grounding"
    headline = "adapted"
    needs = frozenset({ATTENTION})
    metrics: tuple[str, ...]
    """Metrics in the order of ``RowWatch.read``."""
    separates: tuple[str, ...] = ()
    """Metrics whose AUROC, real against absent words, is read."""
    separate_heads: bool = False
    """Whether that is read of every head too."""
    heads: bool = False
    """Whether heads are kept apart; else values are means over heads."""
    layers: int = 0
    """Decoder blocks of the model; set by ``prepare``."""

    def prepare(self, vlm: VLM) -> None:
        """Refuse attention that cannot be read row by row."""
        refuse(vlm.core)
        self.layers = len(vlm.layers)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Both sides of every item, and which of its words are real."""
        assert isinstance(before, RowWatch) and isinstance(after, RowWatch)
        return [
            {
                "id": item.record.id,
                "real": np.array([mention.real for _, mention in words_of(item)], dtype=bool),
                "base": before.sides[item.index],
                "adapted": after.sides[item.index],
            }
            for item in batch.items
        ]

    def groups(self, metric: str) -> tuple[str, ...]:
        """The groups in which a metric is read."""
        return ROWS

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Means over the set, by layer (and head) and over all; AUROC; means by record."""
        records = [value for rank in values for value in rank]
        repeats = [value for rank in noise for value in rank]
        fixed = {"step": step, "probe": self.name}
        made: list[ProbeReading] = []
        for number, metric in enumerate(self.metrics):
            for group in self.groups(metric):
                cells, again = (
                    {side: self.cells(each, side, group, number) for side in ("base", "adapted")}
                    for each in (records, repeats)
                )
                ids = [record["id"] for record in records]
                where = {**fixed, "group": group}
                made += _row_readings.means(where, metric, ids, cells, again, self.heads)
        for number, metric in enumerate(self.separates):
            words, again = (
                {side: words_by_layer(each, side, number) for side in ("base", "adapted")}
                for each in (records, repeats)
            )
            real, real_again = ([r["real"] for r in each] for each in (records, repeats))
            sets = _row_readings.Words(words, real), _row_readings.Words(again, real_again)
            made += _row_readings.separations(fixed, metric, *sets, heads=self.separate_heads)
        return made

    def cells(
        self, records: Sequence[Any], side: str, group: str, number: int
    ) -> _row_readings.Cells:
        """Sums and counts of one metric over all records; zeros where a record has none."""
        found = [record[side] for record in records]
        heads = max((each.sums[group].shape[-1] for each in found if group in each.sums), default=1)
        sums_NLH = np.zeros((len(found), self.layers, heads))
        counts_NL = np.zeros((len(found), self.layers))
        for place, each in enumerate(found):
            if group in each.sums:
                sums_NLH[place] = each.sums[group][:, number]
                counts_NL[place] = each.counts[group][:, number]
        return _row_readings.Cells(sums_NLH, counts_NL)


def words_by_layer(records: Sequence[Any], side: str, number: int) -> list[np.ndarray]:
    """(words, L, H) of one kept metric, by record."""
    return [record[side].words[:, :, number] for record in records]


def columns(batch: ProbeBatch, row: int) -> dict[str, Tensor]:
    """Bool (T,) on the CPU: the row's system, image, user and response tokens, as FastV has them.

    "system" is what stands before the first image token, "user" the prefix's other text (marks
    between the tiles of an image are in it), "response" the tokens of all completions.
    """
    segment_T = batch.rows.segment_RT[row].cpu()
    image_T = batch.image_RT[row]
    before_T = torch.arange(len(segment_T)) < int(image_T.nonzero()[0])
    text_T = (segment_T == PREFIX) & ~image_T
    return {
        "system": text_T & before_T,
        "image": image_T,
        "user": text_T & ~before_T,
        "response": segment_T > PREFIX,
    }
