"""Which neurons fire for which kind of token, and how alignment changes that.

A neuron fires where act(W_gate x) > 0. f_k is its firing rate: fired tokens / tokens, over all
tokens of class k in {image, prompt, response} of the probe set; f_txt joins prompt and response.

    rate/<k>            mean f_k over neurons                                   0 .. 1
    contrast            mean of (f_img - f_txt) / (f_img + f_txt)               -1 text .. 1 image
    image_selective     neurons with contrast >= Settings.selective             count
    text_selective      neurons with contrast <= -Settings.selective            count
    dape                mean entropy of f_k / sum_k f_k                         nats, 0 .. ln 3
    specific/<k>        neurons found for class k (below)                       count
    dead                neurons that fire on no token                           count
    newly_dead, newly_alive   fired before and not now; the other way round     count, side delta

Selective neurons fired on at least ``Settings.fired`` tokens. ``contrast`` and ``dape`` leave dead
neurons out. Specific neurons, MMNeuron (arXiv 2406.11193): among neurons whose largest f_k exceeds
the 95th percentile of all f, the 1 % of all neurons with the lowest entropy, each given to every
class in which its f_k exceeds that percentile. MINER's (arXiv 2410.04819) importance of a neuron
for image or text is the mean of f, mean act and max act over the class's tokens, each scaled to
0 .. 1 within the layer; the best 2 % are its set. Its two attention-weighted scores are left out:
they need whole attention maps. Padding is in no class, unlike in both originals.

Controls of the found sets, each beside what random sets of the same size give (``_random``: its
value is their mean, lo and hi their 2.5 and 97.5 %):

    specific_replicated/<k>   Jaccard of the sets found in two halves of the records
    specific_kept/<k>         Jaccard of the base and adapted sets              side delta
    specific_moved/<k>        mean | f_adapted - f_base | over the base set; random sets have as
                              many neurons of each layer                        side delta
    miner_shared              Jaccard of the image and the text set
    miner_kept/<image|text>   Jaccard of the base and adapted sets              side delta

Sides base and adapted; delta is adapted minus base. lo and hi come from a jackknife over blocks of
records (``_sets.py``); MINER's sets have none. The noise is the change of the same number between
two runs of the first batch. n counts tokens. What it does not show: that a selective neuron causes
anything (masking MMNeuron's moved answers by at most 10 %), or rates that are stable on few tokens:
MMNeuron counts tens of thousands for each class, a probe set has that only for the image.
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
from mlalign.probes._firing_counts import (
    SIDES,
    Counts,
    added,
    class_free,
    contrast,
    dape,
    fired,
    merged,
    miner,
    specific,
)
from mlalign.probes._neurons import gated_mlps
from mlalign.probes._probe import GROUPS, HIDDEN, Probe, ProbeBatch, Watch
from mlalign.probes._sets import Estimate, Key


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    selective: float = Field(default=0.8, gt=0, le=1)
    """Size of the contrast from which a neuron counts as selective (0.8: nine times the rate)."""
    fired: int = Field(default=10, ge=1)
    """Tokens on which a selective neuron fired at least; fewer make a contrast of 1 by chance."""


class _Firing(Watch):
    """Counts of each row, made on the device; no activation is kept."""

    def __init__(self, batch: ProbeBatch, activations: list[Any]) -> None:
        super().__init__(batch)
        self._activations = activations
        self.held: dict[tuple[int, int], np.ndarray] = {}
        """(item index, layer) -> (fired, sum, max; K; F), float32."""

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        """Count what fires, by token class."""
        if kind != "gate":
            return
        for row, item in enumerate(self.batch.items):
            parts = []
            for index in self.batch.groups(row).values():
                at = states_RTD[row, index.to(states_RTD.device)]
                act_TF = self._activations[layer](at).float()
                if len(index):
                    largest_F = act_TF.amax(0)
                else:
                    largest_F = act_TF.new_full((act_TF.shape[1],), -torch.inf)
                parts.append(torch.stack([(act_TF > 0).sum(0).float(), act_TF.sum(0), largest_F]))
            self.held[item.index, layer] = torch.stack(parts, dim=1).cpu().numpy()

    def of(self, row: int) -> Counts:
        """The counts of one row."""
        index, layers = self.batch.items[row].index, len(self._activations)
        all_L = np.stack([self.held[index, layer] for layer in range(layers)])
        tokens = [len(positions) for positions in self.batch.groups(row).values()]
        return Counts(
            tokens_K=np.array(tokens),
            fired_LKF=all_L[:, 0].astype(np.uint16 if max(tokens) < 2**16 else np.int64),
            sum_LKF=all_L[:, 1],
            max_LKF=all_L[:, 2],
        )


class Firing(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "firing"
    prefix = "probe/firing"
    headline = "adapted"
    needs = frozenset({HIDDEN})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._activations: list[Any] = []

    def prepare(self, vlm: VLM) -> None:
        """Refuse a language model whose MLP is not gated."""
        self._activations = [mlp.act_fn for mlp in gated_mlps(vlm, self.name)]

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Counts one batch."""
        return _Firing(batch, self._activations)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """The counts of both sides, by item. Rows of the two watches may differ in order."""
        assert isinstance(before, _Firing) and isinstance(after, _Firing)
        rows = {item.index: row for row, item in enumerate(after.batch.items)}
        return [
            {
                "id": item.record.id,
                "index": item.index,
                "base": before.of(row),
                "adapted": after.of(rows[item.index]),
            }
            for row, item in enumerate(batch.items)
        ]

    def condense(self, values: list[Any]) -> Any:
        """Firing counts by block of records, sums and maxima in total, and mean rates by record."""
        total: dict[str, Any] = {}
        blocks: dict[int, dict[str, Counts]] = {}
        for number, block in _sets.in_blocks([(v["index"], v) for v in values]).items():
            blocks[number] = {s: fired([v[s] for v in block]) for s in SIDES}
        if values:
            total = {s: added([v[s] for v in values]) for s in SIDES}
        rates = [
            (v["id"], side, group, float(v[side].rates_LKF()[:, k].mean()), int(tokens))
            for v in values
            for side in SIDES
            for k, (group, tokens) in enumerate(zip(GROUPS, v[side].tokens_K, strict=True))
        ]
        return {"blocks": blocks, "total": total, "rates": rates}

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Over the set by layer and in all; mean rates by record."""
        blocks, repeats = merged(values), merged(noise)
        tokens = int(sum(block["base"].tokens_K.sum() for block in blocks))
        made = []
        for side in ("base", "adapted", "delta"):
            found = _sets.jackknife(lambda part, s=side: self.statistics(part, s), blocks)
            floor = self._floor(repeats, side)
            fixed: dict[str, Any] = {"step": step, "probe": self.name, "side": side, "n": tokens}
            made += _sets.to_readings(found, noise=floor, **fixed)
            controls = self._controls(blocks, [rank["total"] for rank in values], side)
            made += _sets.to_readings(controls, **fixed)
        return made + [
            ProbeReading(
                step=step,
                probe=self.name,
                metric="rate",
                side=side,
                record=record,
                group=group,
                value=value if count else float("nan"),
                n=count,
            )
            for rank in values
            for record, side, group, value, count in rank["rates"]
        ]

    def statistics(self, blocks: list[dict[str, Counts]], side: str) -> dict[Key, float]:
        """All statistics of one side of these blocks, by (metric, group, layer)."""
        base, adapted = (added([b[s] for b in blocks]) for s in SIDES)
        if side != "delta":
            return self._of_side(base if side == "base" else adapted)
        old, new = self._of_side(base), self._of_side(adapted)
        made = {key: new[key] - old[key] for key in old}
        alive = [counts.fired_LKF.sum(1) > 0 for counts in (base, adapted)]
        made |= _layered("newly_dead", alive[0] & ~alive[1], np.sum)
        made |= _layered("newly_alive", ~alive[0] & alive[1], np.sum)
        sets = [specific(counts.rates_LKF()) for counts in (base, adapted)]
        made |= {("specific_kept", k, -1): _sets.jaccard(sets[0][k], sets[1][k]) for k in GROUPS}
        moved = np.abs(class_free(adapted) - class_free(base)).ravel()
        for k in GROUPS:
            at = moved[sets[0][k]]
            made["specific_moved", k, -1] = float(at.mean()) if len(at) else float("nan")
        return made

    def _of_side(self, counts: Counts) -> dict[Key, float]:
        rates, each = counts.rates_LKF(), contrast(counts)
        often = counts.fired_LKF.sum(1) >= self.settings.fired
        made = _layered("contrast", each, _mean)
        made |= _layered("image_selective", often & (each >= self.settings.selective), np.sum)
        made |= _layered("text_selective", often & (each <= -self.settings.selective), np.sum)
        made |= _layered("dead", counts.fired_LKF.sum(1) == 0, np.sum)
        made |= _layered("dape", dape(rates), _mean)
        found = specific(rates)
        for k, group in enumerate(GROUPS):
            values = rates[:, k] if counts.tokens_K[k] else np.full_like(rates[:, k], np.nan)
            made |= _layered("rate", values, _mean, group)
            member = np.zeros(each.size, dtype=bool)
            member[found[group]] = True
            made |= _layered("specific", member.reshape(each.shape), np.sum, group)
        return made

    def _floor(self, repeats: list[dict[str, Counts]], side: str) -> dict[Key, float]:
        if not repeats:
            return {}
        floor = self.statistics(repeats, "delta")
        if side == "delta":
            return floor
        return {key: abs(value) for key, value in floor.items()}

    def _controls(
        self, blocks: list[dict[str, Counts]], totals: list[dict[str, Counts]], side: str
    ) -> dict[Key, Estimate]:
        """What random sets give, and the overlaps that have no interval."""
        whole = {s: added([t[s] for t in totals if t]) for s in SIDES}
        size = whole["base"].fired_LKF[:, 0].size
        made: dict[Key, Estimate] = {}

        def overlap(metric: str, group: str, one: np.ndarray, other: np.ndarray) -> None:
            made[metric, group, -1] = Estimate(_sets.jaccard(one, other))
            made[f"{metric}_random", group, -1] = _sets.random_jaccard(len(one), len(other), size)

        if side != "delta":
            halves = [[b[side] for b in blocks[start::2]] for start in (0, 1)]
            if all(halves):
                first, second = (specific(added(half).rates_LKF()) for half in halves)
                for k in GROUPS:
                    overlap("specific_replicated", k, first[k], second[k])
            best = miner(whole[side])
            overlap("miner_shared", "", best["image"], best["text"])
            return made
        old, new = (specific(whole[s].rates_LKF()) for s in SIDES)
        moved = np.abs(class_free(whole["adapted"]) - class_free(whole["base"]))
        for k in GROUPS:
            expected = _sets.random_jaccard(len(old[k]), len(new[k]), size)
            made["specific_kept_random", k, -1] = expected
            made["specific_moved_random", k, -1] = _sets.random_mean(moved, old[k])
        best = [miner(whole[s]) for s in SIDES]
        for name in ("image", "text"):
            overlap("miner_kept", name, best[0][name], best[1][name])
        return made


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _layered(metric: str, values_LF: np.ndarray, reduce: Any, group: str = "") -> dict[Key, float]:
    """The reduced values of all layers, and of each."""
    made = {(metric, group, -1): float(reduce(values_LF))}
    return made | {(metric, group, n): float(reduce(each)) for n, each in enumerate(values_LF)}


METHOD = Firing
