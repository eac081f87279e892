"""Which neurons alignment changed most, what they write, and whether they stay the same ones.

With a the coefficients (input of down_proj) of neuron i on the tokens of the three answers, 0 the
base and t the adapted model, on the same tokens:

    c_i = sqrt(mean over tokens (a_t,i - a_0,i)^2)             change score, units of a

(SafetyNeuron, arXiv 2406.14144; there the answers come from the aligned model and the last layer is
left out, here they are the probe set's and all layers count.) At most ``Settings.tokens`` evenly
spaced answer tokens of a record are taken. The top set is the ``Settings.top`` neurons with the
largest c, over all layers.

    change              mean c_i over neurons, by layer too
    share_of_one        share of sum c_i^2 that the 1 % of neurons with the largest c hold; evenly
                        spread change gives 0.01
    share_of_top        the same for the top set; ``_random``: sets with as many neurons of each
                        layer (value: their mean, lo and hi: their 2.5 and 97.5 %)
    top_replicated      Jaccard of the top sets found in two halves of the records
    top_kept_last       Jaccard of the top set with that of the pass before
    top_kept_first      Jaccard with that of the first pass in which anything had changed
    top_*_random        Jaccard of random sets of the same sizes (mean, 2.5 and 97.5 %)

Table ``neurons``, a row for each neuron of the top set: step, rank, layer, neuron, score, relative
(c_i / sqrt(mean a_0,i^2)), noise (c_i between two runs of the same model), and ``written``: the
vocabulary entries with the largest (W_U W_down[:, i]), of the frozen weights, without the final
norm; they are what a positive coefficient adds to. Only candidates' columns are read: the
``CANDIDATES`` times ``top`` neurons that changed most on each rank's records; a neuron of the
top set that is on no rank's list would have no entries (``unread`` counts them). ``total`` counts
the neurons of the model.

All on side "delta". lo and hi: jackknife over blocks of records (``_sets.py``). The noise is the
same number between two runs of the same model. What it does not show: that these neurons are
responsible. In DPO, small shifts spread over very many neurons carry most of the effect (Yang et
al. arXiv 2411.06424): read ``share_of_one`` first, and a top list only where it is far above 0.01.
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
from mlalign.probes._neurons import columns, gated_mlps, parameters_of
from mlalign.probes._probe import HIDDEN, LENS, Probe, ProbeBatch, Watch
from mlalign.probes._sets import Estimate, Key
from mlalign.probes._weights import gathered

ONE = 0.01
CANDIDATES = 4
ENTRIES = 8
"""Vocabulary entries listed for a neuron."""


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    top: int = Field(default=100, ge=1)
    """Neurons of the top set."""
    tokens: int = Field(default=64, ge=1)
    """Answer tokens of each record, evenly spaced."""


class _Answers(Watch):
    """Coefficients on answer tokens, on the model's device and in its dtype."""

    def __init__(self, batch: ProbeBatch, tokens: int) -> None:
        super().__init__(batch)
        self._index = [
            _spaced(batch.groups(r)["response"], tokens) for r in range(len(batch.items))
        ]
        self.held: dict[tuple[int, int], Tensor] = {}
        """(item index, layer) -> (tokens, neurons)."""

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        """Keep the chosen tokens."""
        if kind == "coefficient":
            for row, item in enumerate(self.batch.items):
                at = self._index[row].to(states_RTD.device)
                self.held[item.index, layer] = states_RTD[row, at]


def _spaced(positions: Tensor, count: int) -> Tensor:
    if len(positions) <= count:
        return positions
    return positions[np.linspace(0, len(positions) - 1, count).round().astype(int)]


class TopDrifted(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "top_drifted"
    prefix = "drift/neurons"
    headline = "delta"
    needs = frozenset({HIDDEN, LENS})
    inert = frozenset({"total"})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._mlps: list[Any] = []
        self._tokenizer: Any = None
        self._head_VD: Tensor | None = None
        self._local: np.ndarray | None = None
        """(L, F): squared change on this rank since the weights were last read."""
        self._written: dict[int, list[int]] = {}
        """Flat index of a candidate -> vocabulary entries."""
        self._first, self._last = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self._rows: list[dict[str, Any]] = []

    def prepare(self, vlm: VLM) -> None:
        """Refuse a language model whose MLP is not gated."""
        self._mlps = gated_mlps(vlm, self.name)
        self._tokenizer = vlm.tokenizer

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Keeps the coefficients of one batch."""
        self._head_VD = None if batch.lens is None else batch.lens.head_VD
        return _Answers(batch, self.settings.tokens)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Squared changes and squares, summed over tokens, by item."""
        assert isinstance(before, _Answers) and isinstance(after, _Answers)
        values = []
        for item in batch.items:
            moved, base = [], []
            for layer in range(len(self._mlps)):
                old = before.held[item.index, layer].float()
                new = after.held[item.index, layer].float()
                moved.append((new - old).square().sum(0).cpu())
                base.append(old.square().sum(0).cpu())
            tokens = len(before.held[item.index, 0])
            moved_LF, base_LF = torch.stack(moved).numpy(), torch.stack(base).numpy()
            values.append({"index": item.index, "sums": (moved_LF, base_LF, tokens)})
            self._local = moved_LF if self._local is None else self._local + moved_LF
        return values

    def weights(self, vlm: VLM) -> None:
        """What this rank's candidates write; one down_proj is whole at a time, on every rank."""
        count = CANDIDATES * self.settings.top
        chosen = (
            np.zeros(0, dtype=np.int64) if self._local is None else _sets.top(self._local, count)
        )
        width = 1 if self._local is None else self._local.shape[1]
        self._written = {}
        for layer, mlp in enumerate(self._mlps):
            flat = chosen[chosen // width == layer].tolist()
            with gathered(parameters_of(mlp.down_proj)):
                if flat and self._head_VD is not None:
                    found = _entries(mlp.down_proj, [i % width for i in flat], self._head_VD)
                    self._written.update(zip(flat, found, strict=True))
        self._local = self._head_VD = None

    def condense(self, values: list[Any]) -> Any:
        """Sums by block of records, and what the candidates write."""
        blocks = _sets.in_blocks([(value["index"], value["sums"]) for value in values])
        return {
            "blocks": {number: _added(block) for number, block in blocks.items()},
            "written": self._written,
        }

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Over the set, by layer and in all. Sets the table."""
        blocks, repeats = _merged(values), _merged(noise)
        moved_LF, base_LF, tokens = _added(blocks)
        found = _sets.jackknife(self._statistics, blocks)
        floor = self._statistics(repeats) if repeats else {}
        fixed: dict[str, Any] = {"step": step, "probe": self.name, "side": "delta", "n": tokens}
        made = _sets.to_readings(found, noise=floor, **fixed)
        chosen = _sets.top(moved_LF, self.settings.top)
        made += _sets.to_readings(self._controls(blocks, moved_LF, chosen), **fixed)
        written: dict[int, list[int]] = {}
        for rank in values:
            written |= rank["written"]
        floor_LF = np.sqrt(_added(repeats)[0] / max(_added(repeats)[2], 1)) if repeats else None
        scores = np.sqrt(moved_LF / max(tokens, 1))
        self._rows = self._table(step, chosen, scores, np.sqrt(base_LF / max(tokens, 1)), floor_LF)
        for row, index in zip(self._rows, self._ranked(chosen, scores), strict=True):
            row["written"] = [self._tokenizer.decode([t]) for t in written.get(index, [])]
        unread = float(sum(int(index) not in written for index in chosen))
        counts = {"unread": unread, "total": float(moved_LF.size)}
        counted = {(metric, "", -1): Estimate(value) for metric, value in counts.items()}
        made += _sets.to_readings(counted, **fixed)
        if len(chosen):
            self._last = chosen
            self._first = self._first if len(self._first) else chosen
        return made

    def _statistics(self, blocks: list[Any]) -> dict[Key, float]:
        moved_LF, _, tokens = _added(blocks)
        made: dict[Key, float] = {}
        scores_LF = np.sqrt(moved_LF / max(tokens, 1))
        for layer, (moved, scores) in enumerate(zip(moved_LF, scores_LF, strict=True)):
            made["change", "", layer] = float(scores.mean())
            made["share_of_one", "", layer] = _share_of(moved, ONE)
        made["change", "", -1] = float(scores_LF.mean())
        made["share_of_one", "", -1] = _share_of(moved_LF, ONE)
        chosen, total = _sets.top(moved_LF, self.settings.top), float(moved_LF.sum())
        top = float(moved_LF.ravel()[chosen].sum())
        made["share_of_top", "", -1] = top / total if total > 0 else float("nan")
        return made

    def _controls(
        self, blocks: list[Any], moved_LF: np.ndarray, chosen: np.ndarray
    ) -> dict[Key, Estimate]:
        """Overlaps of the top set, and what random sets give."""
        made: dict[Key, Estimate] = {}
        total = max(float(moved_LF.sum()), np.finfo(float).tiny)
        drawn = _sets.random_mean(moved_LF / total, chosen)
        made["share_of_top_random", "", -1] = Estimate(
            len(chosen) * drawn.value, len(chosen) * drawn.lo, len(chosen) * drawn.hi
        )
        pairs = {"top_kept_last": (self._last, chosen), "top_kept_first": (self._first, chosen)}
        if len(blocks) > 1:
            halves = [_added(blocks[start::2])[0] for start in (0, 1)]
            sets = [_sets.top(half, self.settings.top) for half in halves]
            pairs["top_replicated"] = (sets[0], sets[1])
        for metric, (one, other) in pairs.items():
            known = len(one) > 0 and len(other) > 0
            made[metric, "", -1] = Estimate(_sets.jaccard(one, other) if known else float("nan"))
            expected = _sets.random_jaccard(len(one), len(other), moved_LF.size)
            made[f"{metric}_random", "", -1] = expected if known else Estimate(float("nan"))
        return made

    @staticmethod
    def _ranked(chosen: np.ndarray, scores_LF: np.ndarray) -> list[int]:
        """The set's flat indices, largest score first."""
        return chosen[np.argsort(-scores_LF.ravel()[chosen], kind="stable")].tolist()

    def _table(
        self,
        step: int,
        chosen: np.ndarray,
        scores_LF: np.ndarray,
        base_LF: np.ndarray,
        floor_LF: np.ndarray | None,
    ) -> list[dict[str, Any]]:
        rows = []
        for rank, index in enumerate(self._ranked(chosen, scores_LF)):
            layer, neuron = divmod(index, scores_LF.shape[1])
            score, base = float(scores_LF[layer, neuron]), float(base_LF[layer, neuron])
            rows.append(
                {
                    "step": step,
                    "rank": rank,
                    "layer": layer,
                    "neuron": neuron,
                    "score": score,
                    "relative": score / base if base > 0 else float("nan"),
                    "noise": float("nan") if floor_LF is None else float(floor_LF[layer, neuron]),
                }
            )
        return rows

    def remember(self) -> dict[str, np.ndarray]:
        """The top sets of this pass and of the first that had one."""
        return {"first": self._first, "last": self._last}

    def recall(self, kept: dict[str, np.ndarray]) -> None:
        """Take them back."""
        self._first, self._last = kept["first"], kept["last"]

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """The top set with what it writes."""
        return {"neurons": self._rows}


def _entries(down_proj: Any, neurons: list[int], head_VD: Tensor) -> list[list[int]]:
    """Vocabulary entries with the largest (W_U W_down[:, i]), largest first, for each neuron."""
    columns_DN = columns(down_proj, neurons).to(head_VD.device)
    logits_VN = head_VD.float() @ columns_DN
    return logits_VN.topk(min(ENTRIES, len(logits_VN)), dim=0).indices.T.tolist()


def _added(blocks: list[Any]) -> tuple[np.ndarray, np.ndarray, int]:
    moved, base, tokens = zip(*blocks, strict=True)
    return np.sum(moved, axis=0), np.sum(base, axis=0), int(sum(tokens))


def _merged(ranks: list[Any]) -> list[Any]:
    """Blocks of all ranks, in the order of their numbers."""
    by_block: dict[int, list[Any]] = {}
    for rank in ranks:
        for number, block in rank["blocks"].items():
            by_block.setdefault(number, []).append(block)
    return [_added(by_block[number]) for number in sorted(by_block)]


def _share_of(squares: np.ndarray, share: float) -> float:
    """Share of the sum that the given share of the largest holds; NaN where nothing changed."""
    total = float(squares.sum())
    count = max(1, round(share * squares.size))
    largest = np.partition(squares.ravel(), squares.size - count)[squares.size - count :]
    return float(largest.sum()) / total if total > 0 else float("nan")


METHOD = TopDrifted
