"""Do the last hidden states tell an absent object from a real one? A linear probe with a control.

States are those after the final norm, of the rows that produce response tokens. Groups:

    before     rows that produce the first token of an object word of the model's own answer (row
               t - 1 for the word at t): is it about to say an absent object?
    after      rows at the last token of an object word of any of the three answers: does it know,
               having read the word?
    question   the row that produces the first response token of a record whose facts answer "yes"
               or "no": is the answer no? Left out where the probe set has no such record.

    absent_auroc             P(an absent word, or a "no", scores higher than a real one); a ridge
                             probe fitted on the side itself, scored out of fold
    absent_auroc_base_probe  the same, fitted on the base model's states: what a fixed reader sees
    absent_auroc_control     the same as the first with shuffled labels: its mean and middle 95 %
                             over the shuffles. A reading inside of that range found nothing

Zhao et al. (arXiv 2403.09037) read the logits of the first response token of questions; a linear
probe on the normed state holds every probe on the logits, which are linear in it. A probe set of
descriptions has no such questions, so ``before`` and ``after`` read the words instead. Folds are
of whole records. Ridge on states scaled by the base states' root mean square distance from their
mean, penalty as in the settings, thresholds midway between the classes of the training folds.
0.5 = chance; intervals over records with the out-of-fold scores held fixed, so the control is the
judge of what is found; the floor is the difference between two runs of one model under the base
probe. Words whose other folds hold one class only are not scored and not counted in n. Cost: no
FLOPs beyond the forward.

Not shown: that the model uses what a probe reads, nor that it is about the image: an absent word
may be told by what the word is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sklearn
from pydantic import BaseModel, ConfigDict, Field
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from torch import Tensor

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes._probe import FINAL, Item, Probe, ProbeBatch, Watch
from mlalign.probes._records import COMPLETIONS
from mlalign.probes._summaries import aurocs, coordinates, middle, separation
from mlalign.probes._word_rows import writing, written

READ = ("before", "after", "question")
METRIC = "absent_auroc"


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    words: int = Field(default=8, ge=1)
    """States of each record and group, evenly spaced over its words."""
    folds: int = Field(default=5, ge=2)
    """Parts that the records are split into; fewer where there are fewer records."""
    penalty: float = Field(default=1.0, gt=0)
    """Ridge penalty, for states at a root mean square distance of one from their mean."""
    shuffles: int = Field(default=100, ge=2)
    """Label shuffles of the control."""
    seed: int = 0
    """Of the shuffles."""


def sites(item: Item, limit: int) -> list[tuple[str, int, int, bool]]:
    """(group, number of the completion, token that the row produces, absent) of every state."""
    own = COMPLETIONS.index("own")
    found = [("before", *row[:2], not row[2].real) for row in writing(item, limit, ("own",))]
    found += [("after", *row[:2], not row[2].real) for row in written(item, limit)]
    answer = (item.record.facts.answer or "").strip().strip(".").lower()
    if answer in ("yes", "no"):
        found.append(("question", own, 0, answer == "no"))
    return found


def spread(points_ND: np.ndarray) -> float:
    """Root mean square distance from the mean; 1 where all are the same."""
    return float(points_ND.std(0).dot(points_ND.std(0)) ** 0.5) or 1.0


def fitted(train: np.ndarray, absent_NY: np.ndarray, penalty: float) -> tuple[np.ndarray, Any]:
    """Weights (D, Y) and thresholds (Y,) of one ridge probe per column of bool labels.

    A threshold lies midway between the mean scores of the two classes, so that how many of each a
    fold happens to hold does not shift the scores of its test records. NaN for labels of one class.
    """
    weights = Ridge(alpha=penalty).fit(train, np.where(absent_NY, 1.0, -1.0)).coef_
    weights = weights.reshape(absent_NY.shape[1], -1).T
    thresholds = [
        0.5 * (score[absent].mean() + score[~absent].mean())
        if 0 < absent.sum() < len(absent)
        else np.nan
        for score, absent in zip((train @ weights).T, absent_NY.T, strict=True)
    ]
    return weights, np.array(thresholds)


def out_of_fold(
    fit: np.ndarray, read: np.ndarray, absent_NY: np.ndarray, records: np.ndarray, s: Settings
) -> np.ndarray:
    """(N, Y) scores of ``read`` under probes fitted on ``fit`` without the same records.

    ``fit``, ``read``: (N, D), states of the same rows; ``records``: (N,). NaN for one record, and
    where the other folds hold one class only.
    """
    scores = np.full(absent_NY.shape, np.nan)
    folds = min(s.folds, len(np.unique(records)))
    if folds < 2:
        return scores
    for train, test in GroupKFold(folds).split(fit, groups=records):
        weights, thresholds = fitted(fit[train], absent_NY[train], s.penalty)
        scores[test] = read[test] @ weights - thresholds
    return scores


class _Final(Watch):
    def __init__(self, batch: ProbeBatch, limit: int) -> None:
        super().__init__(batch)
        self.sites = {item.index: sites(item, limit) for item in batch.items}
        self.states: dict[int, np.ndarray] = {}
        """Item index -> (sites, D) float32."""

    def final(self, view: str, states_CSD: Tensor) -> None:
        """Keep the states of the sites."""
        if view != "image":
            return
        for row, item in enumerate(self.batch.items):
            found = self.sites[item.index]
            completions = [row * len(COMPLETIONS) + c for _, c, _, _ in found]
            states = states_CSD[completions, [token for _, _, token, _ in found]]
            self.states[item.index] = states.float().cpu().numpy()


class FirstToken(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "first_token"
    prefix = "probe/first_token"
    headline = "adapted"
    needs = frozenset({FINAL})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Keeps the states of a few rows."""
        return _Final(batch, self.settings.words)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Both sides' states of every item. They are what a probe is fitted on, so they travel."""
        assert isinstance(before, _Final) and isinstance(after, _Final)
        return [
            {
                "groups": np.array([site[0] for site in after.sites[item.index]], dtype=str),
                "absent": np.array([site[3] for site in after.sites[item.index]], dtype=bool),
                "base": before.states[item.index],
                "adapted": after.states[item.index],
            }
            for item in batch.items
        ]

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """AUROCs over the set, by group."""
        # What is not finite can be neither fitted nor scored; the pass says so of the readings.
        records, repeats = (
            [each for rank in ranks for each in rank if _finite(each)] for ranks in (values, noise)
        )
        made = []
        for group in READ:
            pool = _pooled(records, group)
            if len(pool["absent"]) or group != "question":
                fixed = {"step": step, "probe": self.name, "group": group, "record": ""}
                with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
                    made += self._of_group(fixed, pool, _pooled(repeats, group))
        return made

    def _of_group(
        self, fixed: dict[str, Any], pool: dict[str, np.ndarray], again: dict[str, np.ndarray]
    ) -> list[ProbeReading]:
        absent, records = pool["absent"], pool["records"]
        n = len(absent)
        if not 0 < absent.sum() < n:
            # One class alone cannot be told from another.
            return [
                ProbeReading(metric=METRIC + end, side=side, n=0, **fixed) for side, end in _CELLS
            ]
        states = [pool["base"], pool["adapted"], again["base"], again["adapted"]]
        points = coordinates(np.concatenate(states))
        base, adapted, *twice = np.split(
            points / spread(points[:n]), np.cumsum([n, n, len(again["absent"])])
        )
        rng = np.random.default_rng(self.settings.seed)
        shuffled = [rng.permutation(absent) for _ in range(self.settings.shuffles)]
        labels_NY = np.stack([absent, *shuffled], 1)
        made = []
        for side, states in (("base", base), ("adapted", adapted)):
            scores_NY = out_of_fold(states, states, labels_NY, records, self.settings)
            made.append(_reading(fixed, side, "", scores_NY[:, 0], absent, records))
            made.append(_control(fixed, side, scores_NY[:, 1:], labels_NY[:, 1:]))
        scores = out_of_fold(base, adapted, absent[:, None], records, self.settings)[:, 0]
        floor = self._floor(base, absent, twice, again["absent"])
        made.append(_reading(fixed, "adapted", "_base_probe", scores, absent, records, floor))
        return made

    def _floor(
        self, base: np.ndarray, absent: np.ndarray, twice: list[np.ndarray], labels: np.ndarray
    ) -> float:
        weights, _ = fitted(base, absent[:, None], self.settings.penalty)
        scores = np.concatenate([states @ weights for states in twice], 1)
        first, second = aurocs(scores, np.stack([labels, labels], 1))
        return float(abs(second - first))


_CELLS = (
    ("base", ""),
    ("base", "_control"),
    ("adapted", ""),
    ("adapted", "_control"),
    ("adapted", "_base_probe"),
)
"""(side, end of the metric's name) of every reading of a group."""


def _finite(record: dict[str, Any]) -> bool:
    return all(np.isfinite(record[side]).all() for side in ("base", "adapted"))


def _pooled(records: list[Any], group: str) -> dict[str, np.ndarray]:
    """States of both sides, labels and record numbers of one group."""
    if not records:
        nothing = np.zeros((0, 1))
        return {
            "absent": nothing[:, 0] > 0,
            "base": nothing,
            "adapted": nothing,
            "records": nothing,
        }
    picks = [record["groups"] == group for record in records]
    pool = {
        key: np.concatenate(
            [record[key][pick] for record, pick in zip(records, picks, strict=True)]
        )
        for key in ("absent", "base", "adapted")
    }
    return {**pool, "records": np.repeat(np.arange(len(records)), [pick.sum() for pick in picks])}


def _reading(
    fixed: dict[str, Any],
    side: str,
    end: str,
    scores: np.ndarray,
    absent: np.ndarray,
    records: np.ndarray,
    noise: float = float("nan"),
) -> ProbeReading:
    """AUROC of the out-of-fold scores that there are, and how many they are."""
    scored = np.isfinite(scores)
    high, low = (
        [
            scores[scored & (records == record) & (absent == kind)].tolist()
            for record in np.unique(records)
        ]
        for kind in (True, False)
    )
    value, lower, upper = separation(high, low)
    return ProbeReading(
        metric=METRIC + end,
        side=side,
        value=value,
        lo=lower,
        hi=upper,
        noise=noise,
        n=int(scored.sum()),
        **fixed,
    )


def _control(
    fixed: dict[str, Any], side: str, scores_NY: np.ndarray, labels_NY: np.ndarray
) -> ProbeReading:
    """Mean and middle 95 % over the shuffles; n is the number of states."""
    each = aurocs(scores_NY, labels_NY)
    low, high = middle(each)
    return ProbeReading(
        metric=f"{METRIC}_control",
        side=side,
        value=float(np.nanmean(each)) if np.isfinite(each).any() else float("nan"),
        lo=low,
        hi=high,
        n=int(np.isfinite(scores_NY).any(1).sum()),
        **fixed,
    )


METHOD = FirstToken
