"""How the concepts of the base model move: shifts of frozen clusters of object-word states.

States h are outputs of one decoder block at the rows that write object words of the three answers
(row t - 1 for the word's first token t). k-means on the base model's states gives the concepts.
Their members stay the same at every step, since the base and the seed do. With d_i = h_i(adapted)
- h_i(base) over the states of a concept:

    shift          || mean d_i || / mean || h_i(base) ||     relative; 0 = not moved
    consistency    mean of cos(d_i, d_j) over pairs of       1 = all one way, 0 = unrelated; NaN
                   different records                         where nothing moved
    word_overlap   common words / ``words`` of the likeliest words, by the lens, of the concept's
                   mean state before and after               0 .. 1
    common_shift   shift of all states as one concept
    reassigned     share of states nearest to another base centroid when adapted than before

Parekh et al., arXiv 2406.08074 (concepts), Khayatan et al., arXiv 2501.03012 (shifts; their
consistency is the cosine with the mean shift, which is above 0 by chance; states of one record
move alike, so their pairs are left out). Per concept (group "concept 0" is the largest, at the
block that is read), and over all of them: shifts weighted by members, consistency over all pairs
that share a concept. ``shift_control`` and ``consistency_control`` are those of random concepts of
the same sizes, mean and middle 95 %: only what is above them is particular to concepts. A concept
without members is NaN with n = 0.

Intervals are jackknifed over records, concepts held fixed. The floor is the same statistic between
two runs of one model, on the first records. Everything is on side "delta". The table concept_words
says which objects a concept holds and which words its shift made likelier and less likely. Cost:
the head at two states per concept, under 0.1 % of a forward.

Not shown: what the model does with a concept. Clusters of word states also follow grammar and
position. The length of a mean of few states is above 0 by chance, as the control's is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from sklearn.cluster import KMeans
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes._lens import Lens
from mlalign.probes._probe import HIDDEN, LENS, Probe, ProbeBatch, Watch
from mlalign.probes._summaries import coordinates, jackknife, middle, quadratic
from mlalign.probes._word_rows import writing


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    layer: int | None = Field(default=None, ge=0)
    """Decoder block whose output is read, from 0; None: the middle of the last third."""
    concepts: int = Field(default=10, ge=1)
    """Clusters; fewer where there are fewer different states."""
    states: int = Field(default=8, ge=1)
    """States of each record, evenly spaced over its words."""
    words: int = Field(default=10, ge=1)
    """Words by which a concept is described."""
    shuffles: int = Field(default=20, ge=2)
    """Random sets of concepts in the control."""
    seed: int = 0
    """Of k-means and of the control."""


def clusters(states_ND: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(N,) concept of every state, numbered by size, the largest 0."""
    if not len(states_ND):
        return np.zeros(0, dtype=int)
    count = min(count, len(np.unique(states_ND, axis=0)))
    means = KMeans(n_clusters=count, n_init=10, random_state=seed)  # type: ignore[arg-type]
    labels = means.fit_predict(coordinates(states_ND))
    order = np.argsort(-np.bincount(labels, minlength=count), kind="stable")
    return np.argsort(order)[labels]


def shifts(
    base_ND: np.ndarray, moved_ND: np.ndarray, labels: np.ndarray, weights_BN: np.ndarray
) -> np.ndarray:
    """(B,): || sum of d || of each concept, added up, / sum of || h(base) ||, states weighted."""
    lengths_B = np.zeros(len(weights_BN))
    for concept in np.unique(labels):
        at = labels == concept
        gram = moved_ND[at] @ moved_ND[at].T
        lengths_B += np.sqrt(np.maximum(quadratic(weights_BN[:, at], gram), 0))
    return _ratio(lengths_B, weights_BN @ np.linalg.norm(base_ND, axis=1))


def consistencies(
    moved_ND: np.ndarray, labels: np.ndarray, records: np.ndarray, weights_BN: np.ndarray
) -> np.ndarray:
    """(B,): mean cosine over pairs of moved states that share a concept and not a record."""
    lengths_N = np.linalg.norm(moved_ND, axis=1)
    at = lengths_N > 0
    unit_ND = moved_ND[at] / lengths_N[at, None]
    concept, record = labels[at], records[at]
    pairs = (concept[:, None] == concept) & (record[:, None] != record)
    total_B = quadratic(weights_BN[:, at], np.where(pairs, unit_ND @ unit_ND.T, 0.0))
    return _ratio(total_B, quadratic(weights_BN[:, at], pairs.astype(np.float64)))


def reassigned(base_ND: np.ndarray, adapted_ND: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) bool: the nearest base centroid is another one for the adapted state."""
    centroids_KD = np.stack([base_ND[labels == k].mean(0) for k in np.unique(labels)])
    sides = []
    for states_ND in (base_ND, adapted_ND):
        far_NK = np.square(centroids_KD).sum(1) - 2 * states_ND @ centroids_KD.T
        sides.append(far_NK.argmin(1))
    return sides[0] != sides[1]


def _ratio(above_B: np.ndarray, below_B: np.ndarray) -> np.ndarray:
    below_B = np.where(below_B > 0, below_B, np.nan)
    return above_B / below_B


class _Words(Watch):
    def __init__(self, batch: ProbeBatch, layer: int, limit: int) -> None:
        super().__init__(batch)
        self._layer = layer
        self.rows = {item.index: writing(item, limit) for item in batch.items}
        self.states: dict[int, np.ndarray] = {}
        """Item index -> (states, D) float32."""

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        """Keep the states of the rows that write object words."""
        if kind != "residual" or layer != self._layer:
            return
        for row, item in enumerate(self.batch.items):
            queries = self.batch.queries(row)
            at = [int(queries[each.completion][each.token]) for each in self.rows[item.index]]
            self.states[item.index] = states_RTD[row, at].float().cpu().numpy()


class ConceptShift(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "concept_shift"
    prefix = "probe/concept_shift"
    headline = "delta"
    needs = frozenset({HIDDEN, LENS})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._layer = 0
        self._tokenizer: Any = None
        self._lens: Lens | None = None
        self._rows: list[dict[str, Any]] = []

    def prepare(self, vlm: VLM) -> None:
        """Refuse a block that the model does not have."""
        total = len(vlm.layers)
        self._layer = 5 * total // 6 if self.settings.layer is None else self.settings.layer
        if self._layer >= total:
            raise ValueError(
                f"concept_shift: layer is {self._layer}, but the model's blocks are 0 to "
                f"{total - 1}. Mend layer in the probe's settings"
            )
        self._tokenizer = vlm.tokenizer

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Keeps the states of a few rows."""
        self._lens = batch.lens
        return _Words(batch, self._layer, self.settings.states)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Both sides' states of every item. They are what is clustered, so they travel."""
        assert isinstance(before, _Words) and isinstance(after, _Words)
        return [
            {
                "index": item.index,
                "names": [row.mention.name for row in after.rows[item.index]],
                "base": before.states[item.index],
                "adapted": after.states[item.index],
            }
            for item in batch.items
        ]

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Per concept, and over all of them."""
        # The head is large: not held between passes.
        lens, self._lens, self._rows = self._lens, None, []
        # What is not finite cannot be clustered; the pass says so of the readings.
        records, repeats = (
            [each for rank in ranks for each in rank if _finite(each)] for ranks in (values, noise)
        )
        base, adapted, records_N = _pooled(records)
        labels = clusters(base, self.settings.concepts, self.settings.seed)
        fixed = {"step": step, "probe": self.name, "side": "delta", "record": ""}
        if not len(base):
            names = ("shift", "consistency", "common_shift", "reassigned")
            return [ProbeReading(metric=name, n=0, **fixed) for name in names]
        # The first row is the set as it is, each other one leaves out a record.
        parts_BR = np.concatenate([np.ones((1, len(records))), 1 - np.eye(len(records))])
        weights_BN = parts_BR[:, records_N]
        by_record = {r["index"]: labels[records_N == n] for n, r in enumerate(records)}
        floors = _floors(repeats, by_record)
        made = [
            _reading({**fixed, "metric": metric}, each_B, len(base), floors.get(metric))
            for metric, each_B in _over_all(base, adapted, labels, records_N, weights_BN).items()
        ]
        made += self._controls(fixed, base, adapted - base, labels, records_N)
        names = np.array([name for record in records for name in record["names"]])
        for concept in range(self.settings.concepts):
            where = {**fixed, "layer": self._layer, "group": f"concept {concept}"}
            at = labels == concept
            made += self._concept(where, base[at], adapted[at], records_N[at], weights_BN[:, at])
            if lens is not None and at.any():
                made.append(self._describe(where, lens, base[at], adapted[at], names[at].tolist()))
        return made

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """concept_words: one row per concept."""
        return {"concept_words": self._rows}

    def _concept(
        self,
        where: dict[str, Any],
        base: np.ndarray,
        adapted: np.ndarray,
        records: np.ndarray,
        weights_BN: np.ndarray,
    ) -> list[ProbeReading]:
        if not len(base):
            return [ProbeReading(metric=m, n=0, **where) for m in ("shift", "consistency")]
        one = np.zeros(len(base), dtype=int)
        found = {
            "shift": shifts(base, adapted - base, one, weights_BN),
            "consistency": consistencies(adapted - base, one, records, weights_BN),
        }
        return [_reading({**where, "metric": k}, each, len(base)) for k, each in found.items()]

    def _controls(
        self,
        fixed: dict[str, Any],
        base: np.ndarray,
        moved: np.ndarray,
        labels: np.ndarray,
        records: np.ndarray,
    ) -> list[ProbeReading]:
        rng = np.random.default_rng(self.settings.seed)
        shuffled = [rng.permutation(labels) for _ in range(self.settings.shuffles)]
        whole = np.ones((1, len(base)))
        found = {
            "shift_control": [shifts(base, moved, each, whole)[0] for each in shuffled],
            "consistency_control": [
                consistencies(moved, each, records, whole)[0] for each in shuffled
            ],
        }
        made = []
        for metric, each in found.items():
            low, high = middle(np.array(each))
            value = float(np.mean(each))
            made.append(
                ProbeReading(metric=metric, value=value, lo=low, hi=high, n=len(base), **fixed)
            )
        return made

    def _describe(
        self, where: dict[str, Any], lens: Lens, base: np.ndarray, adapted: np.ndarray, names: list
    ) -> ProbeReading:
        """The words of one concept into the table; how many of its likeliest words stayed."""
        count = self.settings.words
        means = torch.from_numpy(np.stack([base.mean(0), adapted.mean(0)]).astype(np.float32))
        with torch.no_grad():
            states = means.to(lens.head_VD.device, lens.head_VD.dtype)
            before, after = torch.cat(list(lens.log_probs(states))).exp().double().cpu()
        change = after - before
        ids = {
            "before": before.topk(count).indices,
            "after": after.topk(count).indices,
            "gained": change.topk(count).indices,
            "lost": change.neg().topk(count).indices,
        }
        # Nothing is gained where nothing moved.
        ids["gained"] = ids["gained"][change[ids["gained"]] > 0]
        ids["lost"] = ids["lost"][change[ids["lost"]] < 0]
        spelled = {k: [self._tokenizer.decode([i]).strip() for i in v] for k, v in ids.items()}
        objects = [f"{name} {times}" for name, times in Counter(names).most_common(count)]
        head = {"concept": where["group"], "layer": self._layer, "n": len(names)}
        self._rows.append({**head, "objects": objects, **spelled})
        same = np.intersect1d(ids["before"].numpy(), ids["after"].numpy())
        return ProbeReading(metric="word_overlap", value=len(same) / count, n=len(names), **where)


def _finite(record: dict[str, Any]) -> bool:
    return all(np.isfinite(record[side]).all() for side in ("base", "adapted"))


def _pooled(records: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, D) of the base and the adapted model in float64, and each state's record number."""
    if not records:
        return np.zeros((0, 1)), np.zeros((0, 1)), np.zeros(0, dtype=int)
    base, adapted = (
        np.concatenate([r[side] for r in records]).astype(np.float64)
        for side in ("base", "adapted")
    )
    return base, adapted, np.repeat(np.arange(len(records)), [len(r["names"]) for r in records])


def _over_all(
    base: np.ndarray,
    adapted: np.ndarray,
    labels: np.ndarray,
    records: np.ndarray,
    weights_BN: np.ndarray,
) -> dict[str, np.ndarray]:
    moved = adapted - base
    changed = reassigned(base, adapted, labels).astype(np.float64)
    return {
        "shift": shifts(base, moved, labels, weights_BN),
        "consistency": consistencies(moved, labels, records, weights_BN),
        "common_shift": shifts(base, moved, np.zeros_like(labels), weights_BN),
        "reassigned": _ratio(weights_BN @ changed, weights_BN.sum(1)),
    }


def _floors(repeats: list[Any], labels: dict[int, np.ndarray]) -> dict[str, float]:
    """The statistics over all concepts between two runs of one model."""
    kept = [each for each in repeats if len(each["names"]) and each["index"] in labels]
    if not kept:
        return {}
    base, again, records = _pooled(kept)
    of_repeats = np.concatenate([labels[record["index"]] for record in kept])
    found = _over_all(base, again, of_repeats, records, np.ones((1, len(base))))
    return {metric: float(each[0]) for metric, each in found.items() if metric != "consistency"}


def _reading(
    fixed: dict[str, Any], each_B: np.ndarray, n: int, noise: float | None = None
) -> ProbeReading:
    """The first value with its interval from the others."""
    low, high = jackknife(each_B)
    noise = float("nan") if noise is None else noise
    return ProbeReading(value=float(each_B[0]), lo=low, hi=high, noise=noise, n=n, **fixed)


METHOD = ConceptShift
