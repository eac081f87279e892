"""Does the image, read through the model's own head, name the objects that the answers mention?

    p(l, j, w)           softmax(W_U norm(h_l[j]))[w]      block l, image token j, word w
    confidence           max over j (and l) of p           probability (internal confidence)
    log_confidence       its logarithm                     nats
    box_lift             p summed over the tokens inside the object's boxes / over all image tokens,
                         / the boxes' share of the tokens  chance = 1
    pointing             share of words whose best token lies inside; chance is pointing_chance
    real_vs_absent_auroc P(a real word has more confidence than an absent one), 0.5 = chance

Logit lens on image tokens: Neo et al., arXiv 2410.07149; internal confidence: Jiang et al., arXiv
2410.02762. The norm is applied once, to the block's output. A word is an object of a record: all
its mentions in the three answers together, real or absent by the facts. It stands for the first
token of each of its spellings there ("lamp", "Lamp", "lamps"), the best one counting; of a word
of several tokens the later ones are left out, since a piece like "board" belongs to many words.
Words of a record that share their first token with a word of the other kind cannot be told apart
and are only counted (words_indistinct). Boxes need a real word whose object the tower sees.

Few blocks are read, each for itself and as layer -1 for all of them: the maximum over them of p at
each token. Means over words, intervals over records; the floor of "delta" is the mean absolute
difference between two runs of one model, that of an AUROC the difference of the two. Tables for
the first records: lens_maps (p of each word on the grid) and lens_words (likeliest word of each
token). Cost: P * D * V * 2 FLOPs a block and record; four blocks of LLaVA-1.5-7B are 6.6 % of one
forward over 700 tokens, hence the rare tier.

Not shown: that the answer uses what stands at a token. Real and absent words are different words:
a frequent word has more confidence everywhere, so read the AUROC beside its change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes._probe import HIDDEN, LENS, RARE, Item, Probe, ProbeBatch, Watch
from mlalign.probes._summaries import separation, side_means

METRICS = ("confidence", "log_confidence", "box_lift", "pointing")
BOXED = ("box_lift", "pointing")
COUNTS = (
    "words_real",
    "words_absent",
    "words_indistinct",
    "words_of_several_tokens",
    "words_real_without_box",
)
KINDS = {"real": True, "absent": False}


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    layers: tuple[int, ...] = ()
    """Decoder blocks to read, from 0; empty: ``count`` of them, evenly spaced up to the last."""
    count: int = Field(default=4, ge=1)
    """How many blocks are read where ``layers`` names none."""
    map_records: int = Field(default=4, ge=0)
    """How many records, the first of the probe set, get maps and words in the tables."""


@dataclass(frozen=True)
class Word:
    """An object that a record's answers mention."""

    name: str
    real: bool
    ids: tuple[int, ...]
    """First tokens of its spellings."""
    several: bool
    """It is spelled with more than one token."""
    indistinct: bool
    """A word of the other kind has the same first token."""


def words_of(item: Item) -> list[Word]:
    """Every object word of an item once, in the order in which they are first mentioned."""
    first: dict[tuple[str, bool], list[int]] = {}
    several = set()
    for ids, each in zip(item.completions, item.mentions, strict=True):
        for mention in each:
            first.setdefault((mention.name, mention.real), []).append(ids[mention.tokens[0]])
            if len(mention.tokens) > 1:
                several.add(mention.name)
    kinds = {
        kind: {i for (_, real), ids in first.items() if real == kind for i in ids}
        for kind in (True, False)
    }
    return [
        Word(name, real, tuple(dict.fromkeys(ids)), name in several, bool({*ids} & kinds[not real]))
        for (name, real), ids in first.items()
    ]


def chosen_layers(settings: Settings, total: int) -> list[int]:
    """The blocks that are read. Raises ValueError for one that the model does not have."""
    if wrong := [layer for layer in settings.layers if not 0 <= layer < total]:
        raise ValueError(
            f"lens_confidence: layers names {wrong[0]}, but the model's blocks are 0 to "
            f"{total - 1}. Mend layers in the probe's settings"
        )
    if settings.layers:
        return sorted(set(settings.layers))
    count = min(settings.count, total)
    return [round((n + 1) * total / count) - 1 for n in range(count)]


def word_statistics(logp_WP: Tensor, inside: list[Tensor | None]) -> np.ndarray:
    """(W, len(METRICS)) from lens log-probs of each word at each image token.

    ``inside``: for each word bool (P,), the tokens inside its boxes, or None: NaN.
    """
    table = np.full((len(inside), len(METRICS)), np.nan)
    for row, (logp_P, inside_P) in enumerate(zip(logp_WP.double(), inside, strict=True)):
        best = logp_P.max()
        table[row, :2] = float(best.exp()), float(best)
        if inside_P is not None:
            # Relative to the best token, so that a map of tiny probabilities does not underflow.
            p_P = (logp_P - best).exp()
            share = float(p_P[inside_P].sum() / p_P.sum())
            table[row, 2:] = share / float(inside_P.double().mean()), inside_P[logp_P.argmax()]
    return table


class _Confidence(Watch):
    def __init__(self, batch: ProbeBatch, layers: list[int]) -> None:
        super().__init__(batch)
        self._layers = layers
        self._words = [words_of(item) for item in batch.items]
        self.words: dict[tuple[int, int], Tensor] = {}
        """(item index, layer) -> (W, P) log-probs of the words at the image tokens, on the CPU."""
        self.top: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """(item index, layer) -> ids and log-probs (P,) of the likeliest token."""

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        """Keep the words' log-probs at the image tokens; the vocabulary is gone at once."""
        if kind != "residual" or layer not in self._layers:
            return
        lens = self.batch.lens
        assert lens is not None, "the pass delivers the lens to a probe that needs it"
        for row, item in enumerate(self.batch.items):
            image_T = self.batch.image_RT[row].to(states_RTD.device)
            spelled, top = [], []
            for logp_PV in lens.log_probs(states_RTD[row, image_T]):
                each = [logp_PV[:, list(word.ids)].amax(-1) for word in self._words[row]]
                spelled.append(torch.stack(each) if each else logp_PV.new_zeros(0, len(logp_PV)))
                top.append(logp_PV.max(-1))
            self.words[item.index, layer] = torch.cat(spelled, 1).cpu()
            logps, ids = (torch.cat(each).cpu() for each in zip(*top, strict=True))
            self.top[item.index, layer] = ids, logps


class LensConfidence(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "lens_confidence"
    prefix = "probe/lens_confidence"
    headline = "adapted"
    needs = frozenset({HIDDEN, LENS})
    tier = RARE
    inert = frozenset({*COUNTS, "pointing_chance"})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._layers: list[int] = []
        self._vlm: VLM | None = None
        self._tables: dict[str, list[dict[str, Any]]] = {}

    def prepare(self, vlm: VLM) -> None:
        """Refuse blocks that the model does not have."""
        self._layers = chosen_layers(self.settings, len(vlm.layers))
        self._vlm = vlm

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Reads the chosen blocks as they come."""
        return _Confidence(batch, self._layers)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Statistics of every word, by item: all chosen blocks together, then each."""
        assert isinstance(before, _Confidence) and isinstance(after, _Confidence)
        values = []
        for item in batch.items:
            words = words_of(item)
            inside = [item.boxes.get(word.name) if word.real else None for word in words]
            value = {
                "id": item.record.id,
                "words": words,
                "areas": [
                    np.nan if each is None else float(each.float().mean()) for each in inside
                ],
            }
            for side, watch in (("base", before), ("adapted", after)):
                maps = [watch.words[item.index, layer] for layer in self._layers]
                maps = [torch.stack(maps).amax(0), *maps]
                value[side] = np.stack([word_statistics(map_WP, inside) for map_WP in maps])
                if item.index < self.settings.map_records:
                    value[f"tables_{side}"] = self._rows(item, words, side, watch)
            values.append(value)
        return values

    def _rows(
        self, item: Item, words: list[Word], side: str, watch: _Confidence
    ) -> dict[str, list[dict[str, Any]]]:
        """Rows of the two tables; none where the image tokens have no grid."""
        assert self._vlm is not None
        rows: dict[str, list[dict[str, Any]]] = {"lens_maps": [], "lens_words": []}
        with contextlib.suppress(NotImplementedError):
            grid = self._vlm.grid(item.image.size)
            for layer in self._layers:
                fixed = {
                    "record": item.record.id,
                    "side": side,
                    "layer": layer,
                    "grid_rows": grid[0],
                    "grid_cols": grid[1],
                }
                for word, map_P in zip(words, watch.words[item.index, layer].exp(), strict=True):
                    map_row = {**fixed, "word": word.name, "real": word.real}
                    rows["lens_maps"].append({**map_row, "values": map_P.tolist()})
                ids, logps = watch.top[item.index, layer]
                spelled = [self._vlm.tokenizer.decode([i]).strip() for i in ids.tolist()]
                found = {"words": spelled, "values": logps.exp().tolist()}
                rows["lens_words"].append({**fixed, **found})
        return rows

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Per record and block; over the set per block, and over all chosen blocks."""
        records = [record for rank in values for record in rank]
        repeats = [record for rank in noise for record in rank]
        self._tables = {
            name: [
                row
                for record in records
                for side in ("base", "adapted")
                for row in record.get(f"tables_{side}", {}).get(name, [])
            ]
            for name in ("lens_maps", "lens_words")
        }
        layers = [-1, *self._layers]
        ids = [record["id"] for record in records]
        fixed: dict[str, Any] = {"step": step, "probe": self.name}
        made = []
        for number, metric in enumerate(METRICS):
            for kind in ("real",) if metric in BOXED else KINDS:
                sums, counts = _sums(records, number, kind, len(layers))
                repeat = _sums(repeats, number, kind, len(layers))
                where = {**fixed, "metric": metric, "group": kind}
                made += side_means(where, layers, ids, sums, counts, repeat)
        made += _separations(fixed, layers, records, repeats)
        return made + _counts(fixed, records)

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """lens_maps and lens_words."""
        return self._tables


def _picked(record: Any, kind: str) -> Iterator[int]:
    """Numbers of the record's words of one kind that can be told from the other kind."""
    for number, word in enumerate(record["words"]):
        if word.real == KINDS[kind] and not word.indistinct:
            yield number


def _sums(
    records: list[Any], metric: int, kind: str, layers: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Side -> (N, layers) sums over words, and how many words they are; words without a box are in
    neither where the metric needs one."""
    boxed = METRICS[metric] in BOXED
    sums = {side: np.zeros((len(records), layers)) for side in ("base", "adapted")}
    counts = np.zeros(len(records), dtype=int)
    for row, record in enumerate(records):
        at = [n for n in _picked(record, kind) if not boxed or np.isfinite(record["areas"][n])]
        counts[row] = len(at)
        for side, table in sums.items():
            table[row] = record[side][:, at, metric].sum(1)
    return sums, counts


def _separations(
    fixed: dict[str, Any], layers: list[int], records: list[Any], repeats: list[Any]
) -> list[ProbeReading]:
    """AUROC of confidence, real against absent words, by side and block."""
    at = METRICS.index("log_confidence")

    def pools(many: list[Any], side: str, layer: int) -> list[list[list[float]]]:
        return [[[r[side][layer, n, at] for n in _picked(r, k)] for r in many] for k in KINDS]

    made = []
    for number, layer in enumerate(layers):
        again = [separation(*pools(repeats, side, number))[0] for side in ("base", "adapted")]
        for side in ("base", "adapted"):
            real, absent = pools(records, side, number)
            value, low, high = separation(real, absent)
            made.append(
                ProbeReading(
                    metric="real_vs_absent_auroc",
                    side=side,
                    record="",
                    layer=layer,
                    value=value,
                    lo=low,
                    hi=high,
                    noise=abs(again[1] - again[0]),
                    n=sum(map(len, (*real, *absent))),
                    **fixed,
                )
            )
    return made


def _counts(fixed: dict[str, Any], records: list[Any]) -> list[ProbeReading]:
    """How many words stand behind the means, what was left out, and the chance of pointing."""
    words = [word for record in records for word in record["words"]]
    areas = [r["areas"][n] for r in records for n in _picked(r, "real")]
    boxed = [area for area in areas if np.isfinite(area)]
    counts = (
        sum(word.real for word in words),
        sum(not word.real for word in words),
        sum(word.indistinct for word in words),
        sum(word.several for word in words),
        len(areas) - len(boxed),
    )
    where = {**fixed, "side": "adapted", "record": ""}
    made = [
        ProbeReading(metric=metric, value=float(count), n=count, **where)
        for metric, count in zip(COUNTS, counts, strict=True)
    ]
    chance = float(np.mean(boxed)) if boxed else float("nan")
    return [*made, ProbeReading(metric="pointing_chance", value=chance, n=len(boxed), **where)]


METHOD = LensConfidence
