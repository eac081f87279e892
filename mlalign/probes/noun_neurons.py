"""Which neurons write the object words of an answer, and whether alignment keeps them.

For an object word whose first token v is produced by row t - 1, and neuron i with coefficient a_i
(input of down_proj) in that row, Pan et al. (arXiv 2311.07470):

    score_i = a_i(t - 1) * (W_U W_down[:, i])[v]         logit that the neuron adds to v directly

Before the final norm, as in the paper, and one column of W_U for each word: the product of W_U and
W_down is never formed. The base side takes the frozen W_down, the adapted side W_down + s B A; W_U
is the base model's for both. For each word, with its ``Settings.top`` neurons of largest score > 0
over all layers:

    score               sum of score_i over neurons: what all MLPs add, by layer too
    top_share           share of the sum of positive scores that the top neurons hold    0 .. 1
    top_share_random    the same for random sets with as many neurons of every layer (expected)
    overlap_same_word   mean Jaccard with the top sets of the same noun in other records
    overlap_other_word  the same with other nouns: neurons that serve any noun
    kept                Jaccard of the base and adapted sets                 side delta
    kept_random         Jaccard of random sets of the same sizes; lo, hi: 2.5 and 97.5 %

Groups: "real" and "absent" words, by the facts. Means over words; lo and hi bootstrap records,
which are drawn whole. Side delta of a score or share is adapted minus base. The noise is the mean
absolute change of the number between two runs of the same model. Table ``noun_neurons``: for each
side and noun the neurons that are in the top set of most of its occurrences (step, side, word,
layer, neuron, count, of, score: mean over the occurrences that list it). Without a word there is no
number (NaN, n = 0). What it does not show: what a neuron adds through later layers, or that
removing it would remove the word.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes import _sets
from mlalign.probes._neurons import gated_mlps, parameters_of, written
from mlalign.probes._probe import HIDDEN, LENS, Item, Probe, ProbeBatch, Watch
from mlalign.probes._sets import Estimate, Key
from mlalign.probes._stats import interval
from mlalign.probes._weights import gathered
from mlalign.probes._word_neurons import (
    SIDES,
    kept_random,
    table,
    top_sets,
    word_numbers,
    word_overlaps,
)

KINDS = ("real", "absent")


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    top: int = Field(default=20, ge=1)
    """Neurons of a word's top set."""
    words: int = Field(default=8, ge=1)
    """Object words of each record, evenly spaced where it has more. A word counts once in answers
    that begin alike up to it."""


class _Rows(Watch):
    """Coefficients of the rows that produce object words, on the CPU in the model's dtype."""

    def __init__(self, batch: ProbeBatch, limit: int) -> None:
        super().__init__(batch)
        self.words = {item.index: words_of(item, limit) for item in batch.items}
        self._rows = []
        """For each item the rows that produce its words' first tokens."""
        for row, item in enumerate(batch.items):
            queries = batch.queries(row)
            rows = [int(queries[w.completion][w.token]) for w in self.words[item.index]]
            self._rows.append(torch.tensor(rows, dtype=torch.long))
        self.held: dict[tuple[int, int], Tensor] = {}
        """(item index, layer) -> (words, neurons)."""

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        """Keep the words' rows."""
        if kind == "coefficient":
            for row, item in enumerate(self.batch.items):
                at = self._rows[row].to(states_RTD.device)
                self.held[item.index, layer] = states_RTD[row, at].cpu()

    def of(self, index: int, layers: int) -> Tensor:
        """(L, words, F) of the item with this number."""
        return torch.stack([self.held[index, layer] for layer in range(layers)])


class Word(NamedTuple):
    """An object word of an answer."""

    name: str
    real: bool
    completion: int
    token: int
    """Number of its first token among the completion's."""
    vocabulary: int
    """Id of that token."""


def words_of(item: Item, limit: int) -> list[Word]:
    """The item's object words, answer by answer, at most ``limit`` of them."""
    found: dict[tuple[int, ...], Word] = {}
    for number, (ids, each) in enumerate(zip(item.completions, item.mentions, strict=True)):
        for mention in each:
            token = mention.tokens[0]
            word = Word(mention.name, mention.real, number, token, ids[token])
            # The same token after the same tokens is the same number.
            found.setdefault(tuple(ids[: token + 1]), word)
    words = list(found.values())
    places = np.linspace(0, len(words) - 1, min(limit, len(words))).round().astype(int)
    return [words[place] for place in places]


class NounNeurons(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "noun_neurons"
    prefix = "probe/noun_neurons"
    headline = "adapted"
    needs = frozenset({HIDDEN, LENS})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._mlps: list[Any] = []
        self._adapter = False
        self._columns: dict[int, Tensor] = {}
        """Token id -> (D,) its column of W_U."""
        self._written: dict[str, list[np.ndarray]] = {}
        """Side -> for each layer (tokens, F): W_U[token] W_down, in the order of ``_columns``."""
        self._rows: list[dict[str, Any]] = []

    def prepare(self, vlm: VLM) -> None:
        """Refuse a language model whose MLP is not gated."""
        self._mlps = gated_mlps(vlm, self.name)
        self._adapter = hasattr(vlm.model, "peft_config")

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Keeps the rows of one batch, and the columns of its words' tokens."""
        watch = _Rows(batch, self.settings.words)
        if batch.lens is not None:
            for token in (w.vocabulary for words in watch.words.values() for w in words):
                column_D = batch.lens.head_VD[token].detach().float()
                self._columns.setdefault(token, column_D.clone())
        return watch

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Coefficients of both sides, by item."""
        assert isinstance(before, _Rows) and isinstance(after, _Rows)
        layers = len(self._mlps)
        return [
            {
                "id": item.record.id,
                "words": before.words[item.index],
                # In the repeat, which lies in a batch of its own, both sides are the adapted model.
                "weights": SIDES if after.batch is before.batch else ("adapted", "adapted"),
                "base": before.of(item.index, layers),
                "adapted": after.of(item.index, layers),
            }
            for item in batch.items
        ]

    def weights(self, vlm: VLM) -> None:
        """What every neuron writes to the words' tokens; one down_proj is whole at a time."""
        columns = list(self._columns.values())
        found: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
        for mlp in self._mlps:
            with gathered(parameters_of(mlp.down_proj)):
                # A rank without a word opens the context too: the others wait in it.
                if columns:
                    pair = written(mlp.down_proj, torch.stack(columns))
                    for side, each_MF in zip(SIDES, pair, strict=True):
                        found[side].append(each_MF.cpu().numpy())
        if not self._adapter and self._written:
            # Without an adapter the base is the model of the first pass.
            found["base"] = self._written["base"]
        self._written = found

    def condense(self, values: list[Any]) -> Any:
        """Top sets and sums by word, for both sides."""
        number = {token: at for at, token in enumerate(self._columns)}
        records = []
        for value in values:
            at = [number[word.vocabulary] for word in value["words"]]
            made: dict[str, Any] = {"id": value["id"], "size": value["base"][:, :1].numel()}
            made["words"] = [(word.name, word.real) for word in value["words"]]
            for side, whose in zip(SIDES, value["weights"], strict=True):
                made[side] = []
                if at:
                    writes_LMF = np.stack([layer[at] for layer in self._written[whose]])
                    scores_LMF = value[side].float().numpy() * writes_LMF
                    made[side] = top_sets(scores_LMF, self.settings.top)
            records.append(made)
        return records

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Means over words by kind, for every side; sets the table."""
        records = [record for rank in values for record in rank]
        repeats = [record for rank in noise for record in rank]
        made = []
        for kind in KINDS:
            n = sum(real == (kind == "real") for r in records for _, real in r["words"])
            for side in (*SIDES, "delta"):
                fixed: dict[str, Any] = {"step": step, "probe": self.name, "side": side, "n": n}
                found = self._of_kind(records, kind, side)
                floor = self._floor(repeats, kind, side)
                made += _sets.to_readings(found, noise=floor, **fixed)
        self._rows = table(step, records)
        return made

    def _of_kind(self, records: list[Any], kind: str, side: str) -> dict[Key, Estimate]:
        per_record = [word_numbers(record, kind, side) for record in records]
        if side != "delta":
            between = word_overlaps(records, kind, side)
            per_record = [one | other for one, other in zip(per_record, between, strict=True)]
        made: dict[Key, Estimate] = {}
        names: dict[tuple[str, int], None] = {}
        for numbers in per_record:
            names |= dict.fromkeys(numbers)
        for metric, layer in names:
            lists = [numbers.get((metric, layer), []) for numbers in per_record]
            lists = [[v for v in each if np.isfinite(v)] for each in lists]
            sums, counts = [sum(each) for each in lists], [len(each) for each in lists]
            mean = sum(sums) / sum(counts) if sum(counts) else float("nan")
            made[metric, kind, layer] = Estimate(mean, *interval(sums, counts), sum(counts))
        if side == "delta" and names:
            made["kept_random", kind, -1] = kept_random(records, kind)
        if not names:
            made["score", kind, -1] = made["top_share", kind, -1] = Estimate(float("nan"))
        return made

    def _floor(self, repeats: list[Any], kind: str, side: str) -> dict[Key, float]:
        """Mean absolute change of each number between two runs of the same model."""
        per_record = [word_numbers(record, kind, "delta") for record in repeats]
        names = dict.fromkeys(name for numbers in per_record for name in numbers)
        floor = {}
        for metric, layer in names:
            each = [abs(v) for n in per_record for v in n.get((metric, layer), [])]
            floor[metric, kind, layer] = float(np.nanmean(each)) if each else float("nan")
        if side != "delta":
            floor.pop(("kept", kind, -1), None)
        return floor

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Neurons of each noun."""
        return {"noun_neurons": self._rows}


METHOD = NounNeurons
