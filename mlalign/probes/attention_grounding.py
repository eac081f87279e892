"""Where attention looks while the response is produced: mass on the image, inside boxes, on sinks.

For the rows that produce response tokens (row t - 1 for the token at t), per layer and head, with
A the attention weights, I the image tokens and G the tokens inside the boxes of the named object:

    image_mass           m = sum over I of A                    share, 0..1 (VAR, arXiv 2411.16724)
    image_mass_no_first  m / (1 - A[first token])               the same without the usual sink
    entropy              H(A on I, renormalised) / log |I|      0 one token .. 1 uniform
    row_entropy          H(A)                                   nats, over everything visible
    sink_first           A[first token of the row]              BOS, where the tokenizer has one
    sink_image           A on the one image token that gets most, over the record's rows and heads
    box_share            sum over G of A / m                    share, 0..1
    box_lift             box_share / (|G| / |I|)                chance = 1

Means over rows: "response" is every token of the own, chosen and rejected answers; "real" and
"absent" are the tokens of object words that the facts affirm or not. Boxes are read at real words
whose object has a box that the tower sees. ``real_vs_absent_auroc`` is that of image_mass: P(a
real word has more than an absent one). Readings: per record (mean over heads), and over the set
per head, with 95 % intervals over records; layer -1 is the mean over layers.

The side "delta" is adapted minus base; its noise is the mean absolute difference between two runs
of the same model. Not an explanation: attention can move without effect on the answer, so read it
beside image_reliance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mlalign.branching.attention import refuse
from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes._grounding_sums import (
    BOX_METRICS,
    ROW_METRICS,
    over_set,
    per_record,
    totals,
)
from mlalign.probes._probe import ATTENTION, Item, Probe, ProbeBatch, Watch
from mlalign.probes._records import COMPLETIONS, Mention
from mlalign.probes._summaries import separation


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    maps: bool = True
    """Write attention maps at object words, mean over layers and heads, for the report."""
    maps_by_layer: bool = False
    """Write them for every layer too (layers times as much)."""


@dataclass
class _Side:
    """What one side's attention was for one item; arrays get one entry per layer, in order."""

    response: list[np.ndarray]
    """(metrics, H): mean over the response tokens."""
    words: list[np.ndarray]
    """(words, metrics + 2, H); the last two are box_share and box_lift, NaN without a box."""
    maps: list[np.ndarray]
    """(words, P): attention on image tokens, mean over heads and the word's tokens."""
    tokens: int


def row_statistics(weights_HQT: Tensor, image_T: Tensor) -> Tensor:
    """(len(ROW_METRICS), H, Q) from attention rows and the bool mask of image tokens."""
    image_HQP = weights_HQT[..., image_T]
    mass_HQ = image_HQP.sum(-1)
    first_HQ = weights_HQT[..., 0]
    p_HQP = image_HQP / mass_HQ.clamp_min(1e-30)[..., None]
    size = torch.tensor(float(image_HQP.shape[-1]))
    without = (mass_HQ - first_HQ * image_T[0].float()) / (1 - first_HQ).clamp_min(1e-30)
    sink = image_HQP.mean((0, 1)).argmax()
    values = {
        "image_mass": mass_HQ,
        "image_mass_no_first": without,
        "entropy": torch.special.entr(p_HQP).sum(-1) / size.log(),
        "row_entropy": torch.special.entr(weights_HQT).sum(-1),
        "sink_first": first_HQ,
        "sink_image": image_HQP[..., sink],
    }
    return torch.stack([values[name] for name in ROW_METRICS])


def box_statistics(image_HQP: Tensor, inside_P: Tensor) -> Tensor:
    """(2, H, Q): share of the image mass inside the box tokens, and its lift over their area."""
    share_HQ = image_HQP[..., inside_P].sum(-1) / image_HQP.sum(-1).clamp_min(1e-30)
    return torch.stack([share_HQ, share_HQ / inside_P.float().mean()])


class _Grounding(Watch):
    def __init__(self, batch: ProbeBatch) -> None:
        super().__init__(batch)
        self.sides: dict[int, _Side] = {}
        lengths = [[len(q) for q in batch.queries(row)] for row in range(len(batch.items))]
        for item, each in zip(batch.items, lengths, strict=True):
            self.sides[item.index] = _Side([], [], [], tokens=sum(each))
        # Where each completion's tokens begin among the rows that are handed out.
        self._starts = [np.cumsum([0, *each[:-1]]).tolist() for each in lengths]

    def attention(self, layer: int, row: int, weights_HQT: Tensor) -> None:
        """Reduce one layer's rows to statistics at once."""
        item = self.batch.items[row]
        image_T = self.batch.image_RT[row].to(weights_HQT.device)
        rows_MHQ = row_statistics(weights_HQT, image_T)
        side = self.sides[item.index]
        side.response.append(rows_MHQ.mean(-1).cpu().numpy())
        image_HQP = weights_HQT[..., image_T]
        words, maps = [], []
        for completion, mention in _words(item):
            tokens = [self._starts[row][completion] + t for t in mention.tokens]
            boxes = torch.full((2, *rows_MHQ.shape[1:2]), float("nan"), device=rows_MHQ.device)
            if mention.real and mention.name in item.boxes:
                inside_P = item.boxes[mention.name].to(image_T.device)
                boxes = box_statistics(image_HQP[:, tokens], inside_P).mean(-1)
            words.append(torch.cat([rows_MHQ[..., tokens].mean(-1), boxes]).cpu().numpy())
            maps.append(image_HQP[:, tokens].mean((0, 1)).cpu().numpy())
        heads, patches = image_HQP.shape[0], image_HQP.shape[-1]
        width = len(ROW_METRICS) + len(BOX_METRICS)
        side.words.append(np.array(words) if words else np.zeros((0, width, heads), np.float32))
        side.maps.append(np.array(maps) if maps else np.zeros((0, patches), np.float32))


def _words(item: Item) -> Iterator[tuple[int, Mention]]:
    """(number of the completion, object word) in a fixed order."""
    for completion, each in enumerate(item.mentions):
        for mention in each:
            yield completion, mention


class AttentionGrounding(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "attention_grounding"
    prefix = "grounding"
    headline = "adapted"
    needs = frozenset({ATTENTION})
    inert = frozenset({"words_real", "words_absent", "words_real_without_box"})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._maps: dict[str, list[dict[str, Any]]] = {}
        self._vlm: VLM | None = None

    def prepare(self, vlm: VLM) -> None:
        """Refuse attention that cannot be read row by row."""
        refuse(vlm.core)
        self._vlm = vlm

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Reduces attention rows as they come."""
        return _Grounding(batch)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Both sides of every item, with its words."""
        assert isinstance(before, _Grounding) and isinstance(after, _Grounding)
        values = []
        for item in batch.items:
            sides = {"base": before.sides[item.index], "adapted": after.sides[item.index]}
            words = [(COMPLETIONS[c], m, m.name in item.boxes) for c, m in _words(item)]
            grid = (0, 0)
            # Without a grid the masses stand; only boxes and maps need one.
            with contextlib.suppress(NotImplementedError):
                grid = self._vlm.grid(item.image.size) if self._vlm is not None else grid
            values.append({"id": item.record.id, "words": words, "grid": grid, **sides})
        return values

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Per record and layer; over the set per layer and head, and over all of them."""
        records = [value for rank in values for value in rank]
        repeats = [value for rank in noise for value in rank]
        table, floor = totals(records), totals(repeats)
        self._maps = self._map_rows(records)
        made: list[ProbeReading] = []
        for (metric, group), cell in table.items():
            delta = cell.difference()
            for side, sums_NLH in (
                ("base", cell.base),
                ("adapted", cell.adapted),
                ("delta", delta),
            ):
                fixed = {"step": step, "probe": self.name, "side": side, "group": group}
                noise_LH = floor[metric, group].floor() if side == "delta" else None
                made += over_set(fixed, metric, sums_NLH, cell.counts, noise_LH)
                if side != "delta":
                    ids = [record["id"] for record in records]
                    made += per_record(fixed, metric, ids, sums_NLH, cell.counts)
        return made + self._separation(step, records) + self._word_counts(step, records)

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """attention_maps, and attention_maps_by_layer where the settings ask for it."""
        return self._maps

    def _separation(self, step: int, records: list[Any]) -> list[ProbeReading]:
        """AUROC of image mass, real against absent words, by layer and over the layers' mean."""
        made = []
        for side in ("base", "adapted"):
            # By kind, then record by record: (words, layers), mean over heads.
            pools: dict[bool, list[np.ndarray]] = {True: [], False: []}
            for record in records:
                mass_WL = np.stack(record[side].words, 1)[:, :, 0].mean(-1)
                real_W = np.array([mention.real for _, mention, _ in record["words"]], dtype=bool)
                for kind, pool in pools.items():
                    pool.append(mass_WL[real_W == kind])
            layers = len(records[0][side].response)
            for layer in range(-1, layers):
                each = [
                    [(w.mean(1) if layer < 0 else w[:, layer]).tolist() for w in pools[kind]]
                    for kind in (True, False)
                ]
                value, low, high = separation(*each)
                made.append(
                    ProbeReading(
                        step=step,
                        probe=self.name,
                        metric="real_vs_absent_auroc",
                        side=side,
                        record="",
                        layer=layer,
                        value=value,
                        lo=low,
                        hi=high,
                        n=sum(len(words) for kind in each for words in kind),
                    )
                )
        return made

    def _word_counts(self, step: int, records: list[Any]) -> list[ProbeReading]:
        """How many words stand behind the means; what no box was seen for is counted too."""
        words = [word for record in records for word in record["words"]]
        boxed = sum(mention.real and box for _, mention, box in words)
        real = sum(mention.real for _, mention, _ in words)
        counts = {
            "words_real": real,
            "words_absent": len(words) - real,
            "words_real_without_box": real - boxed,
        }
        fixed: dict[str, Any] = {"step": step, "probe": self.name, "side": "adapted", "record": ""}
        return [ProbeReading(metric=k, value=float(v), n=v, **fixed) for k, v in counts.items()]

    def _map_rows(self, records: list[Any]) -> dict[str, list[dict[str, Any]]]:
        rows: list[dict[str, Any]] = []
        by_layer: list[dict[str, Any]] = []
        # Without a grid of image tokens there is nothing to draw a map on.
        for record in (record for record in records if record["grid"] != (0, 0)):
            for side in ("base", "adapted"):
                maps_WLP = np.stack(record[side].maps, 1)
                for (completion, mention, _), maps_LP in zip(
                    record["words"], maps_WLP, strict=True
                ):
                    row = {
                        "record": record["id"],
                        "side": side,
                        "completion": completion,
                        "word": mention.name,
                        "start": mention.start,
                        "end": mention.end,
                        "real": mention.real,
                        "grid_rows": record["grid"][0],
                        "grid_cols": record["grid"][1],
                    }
                    rows.append({**row, "values": maps_LP.mean(0).tolist()})
                    by_layer += [
                        {**row, "layer": layer, "values": map_P.tolist()}
                        for layer, map_P in enumerate(maps_LP)
                    ]
        tables = {"attention_maps": rows} if self.settings.maps else {}
        return (
            {**tables, "attention_maps_by_layer": by_layer}
            if self.settings.maps_by_layer
            else tables
        )


METHOD = AttentionGrounding
