"""What a linear probe reads from the states of a record: objects, attributes, positions.

Asked for each fact value with enough records: does the image hold this object, anything with this
attribute (a colour), anything at this position? One state per record, of ``Settings.layers`` blocks
(evenly spaced, the last among them) and two sources:

    image     mean state of the image tokens
    prompt    state of the last prompt token, which produces the answer's first token

Ridge regression to -1 and 1, the penalty chosen by leave-one-out within the training part, the bar
halfway between the mean scores of both kinds; cross-validated over records in ``FOLDS`` parts. The
score is balanced accuracy on records that were not fitted (0.5 is chance, 1 perfect), averaged over
fact values.

    <source>            fitted and read on the same model          sides base, adapted, delta
    <source>_fixed      fitted on the base, read on the adapted    side adapted
    <source>_control    the same with labels shuffled over records, as many of each kind (control
                        task, Hewitt and Liang arXiv 1909.03368)   sides base, adapted
    values_read, values_left_out, records_without     counts

Groups: "object", "attribute", "position", as the facts have them. A fact value needs
``Settings.minimum`` records with and without it; the others are left out and counted, and a group
without any is NaN with n = 0. ``records_without``: records whose facts have nothing of the group; a
record that names no attribute counts for no question about attributes. An object that is not among
the facts counts as absent, also where the facts do not claim to be exhaustive.

A fall of <source>_fixed with an unchanged <source> means the fact is still there and written
otherwise; a fall of both, that it is harder to read (Salin et al., AAAI 2022, probe before and
after fine-tuning). lo and hi bootstrap the records' held-out answers (n: records; fits stay as they
are, so the limits are somewhat narrow). No noise floor: it would need a second run of all records.
With few records no difference is found: read the interval first. What it does not show: that the
model uses what can be read.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import sklearn
import torch
from pydantic import BaseModel, ConfigDict, Field
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold
from torch import Tensor

from mlalign.branching.batch import PREFIX, ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes import _sets
from mlalign.probes._probe import HIDDEN, RARE, Item, Probe, ProbeBatch, Watch
from mlalign.probes._sets import Estimate, Key

FOLDS = 5
KINDS = ("object", "attribute", "position")
SOURCES = ("image", "prompt")
RESAMPLES = 500
PENALTIES = np.logspace(-4, 2, 7)


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    layers: int = Field(default=3, ge=1)
    """Blocks that are read."""
    minimum: int = Field(default=5, ge=2)
    """Records with, and without, a fact value that is asked for."""
    values: int = Field(default=6, ge=1)
    """Fact values of a group: those nearest to half of the records."""


class _States(Watch):
    """One state per record, source and chosen block, on the CPU."""

    def __init__(self, batch: ProbeBatch, layers: list[int]) -> None:
        super().__init__(batch)
        self._layers = set(layers)
        self.held: dict[tuple[int, int], np.ndarray] = {}
        """(item index, layer) -> (sources, width), float32."""

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        """Keep the mean over image tokens and the last prompt token's state."""
        if kind != "residual" or layer not in self._layers:
            return
        for row, item in enumerate(self.batch.items):
            image = self.batch.image_RT[row].nonzero()[:, 0].to(states_RTD.device)
            prefix = (self.batch.rows.segment_RT[row] == PREFIX).nonzero()[:, 0]
            mean_D = states_RTD[row, image].float().mean(0)
            last_D = states_RTD[row, int(prefix[-1])].float()
            self.held[item.index, layer] = torch.stack([mean_D, last_D]).cpu().numpy()


def facts_of(item: Item) -> dict[str, frozenset[str] | None]:
    """Group -> the values that hold of the item's image; None where its facts have none of it."""
    objects = item.record.facts.objects
    values = {
        "object": frozenset(o.name for o in objects),
        "attribute": frozenset(a for o in objects for a in o.attributes),
        "position": frozenset(o.position for o in objects if o.position is not None),
    }
    return {kind: each or None for kind, each in values.items()}


def questions(
    facts: list[frozenset[str] | None], minimum: int, most: int
) -> tuple[dict[str, np.ndarray], int]:
    """Fact value -> label of each record (1, 0; -1: nothing known), and how many are left out."""
    found: dict[str, np.ndarray] = {}
    every = sorted({value for each in facts if each for value in each})
    for value in every:
        labels = np.array([-1 if each is None else int(value in each) for each in facts])
        if min((labels == 1).sum(), (labels == 0).sum()) >= minimum:
            found[value] = labels
    balance = {v: min((y == 1).sum(), (y == 0).sum()) for v, y in found.items()}
    chosen = sorted(found, key=lambda v: (-balance[v], v))[:most]
    return {value: found[value] for value in chosen}, len(every) - len(chosen)


def held_out(
    fitted_ND: np.ndarray, read: list[np.ndarray], labels_VN: np.ndarray
) -> list[np.ndarray]:
    """For each of ``read``, (V, N): 1 where the probe answers a held-out record rightly, else 0.

    ``fitted_ND``: states that the probes are fitted on; ``read``: states, (N, D) each, of the same
    records that they are then asked of. NaN for records with label -1, which are the same for all.
    """
    known = np.flatnonzero(labels_VN[0] >= 0)
    right = [np.full(labels_VN.shape, np.nan) for _ in read]
    # The same parts for all fact values, on both sides and in every pass.
    folds = KFold(min(FOLDS, len(known)), shuffle=True, random_state=0)
    for train, test in folds.split(known):
        train, test = known[train], known[test]
        middle = fitted_ND[train].mean(0)
        # One scale for all features: a turn of the state space changes nothing, and the penalties
        # mean the same in every layer.
        scale = np.linalg.norm(fitted_ND[train] - middle, axis=1).mean() or 1.0
        inputs = (fitted_ND[train] - middle) / scale
        labels_VT = labels_VN[:, train]
        probe = RidgeCV(alphas=PENALTIES, alpha_per_target=True).fit(inputs, 2 * labels_VT.T - 1)
        bar_V = _midpoints(_told(probe, inputs), labels_VT)
        for into, states_ND in zip(right, read, strict=True):
            yes_VT = _told(probe, (states_ND[test] - middle) / scale) > bar_V[:, None]
            into[:, test] = yes_VT == labels_VN[:, test]
    return right


def _told(probe: RidgeCV, inputs: np.ndarray) -> np.ndarray:
    """(V, records)."""
    return probe.predict(inputs).reshape(len(inputs), -1).T


def _midpoints(scores_VT: np.ndarray, labels_VT: np.ndarray) -> np.ndarray:
    """(V,): halfway between the two kinds' mean scores, so that the rarer kind counts as much.

    Where a part holds one kind only, a bar that always answers that kind.
    """
    means = []
    for kind in (1, 0):
        members_VT = labels_VT == kind
        with np.errstate(invalid="ignore"):
            means.append(np.where(members_VT, scores_VT, 0).sum(1) / members_VT.sum(1))
    only_V = np.where(labels_VT[:, 0] == 1, -np.inf, np.inf)
    return np.where(labels_VT.min(1) == labels_VT.max(1), only_V, (means[0] + means[1]) / 2)


def balanced(right_VN: np.ndarray, labels_VN: np.ndarray, drawn_BN: np.ndarray) -> np.ndarray:
    """(B,): balanced accuracy, mean over fact values V; records count ``drawn_BN`` times.

    A draw without one of the kinds leaves a fact value out; NaN where it leaves out all.
    """
    known = np.nan_to_num(right_VN)
    shares = []
    for kind in (0, 1):
        members = (labels_VN == kind).astype(float)
        with np.errstate(invalid="ignore"):
            shares.append(drawn_BN @ (known * members).T / (drawn_BN @ members.T))
    each_BV = (shares[0] + shares[1]) / 2
    asked_BV = np.isfinite(each_BV)
    with np.errstate(invalid="ignore"):
        return np.where(asked_BV, each_BV, 0).sum(1) / asked_BV.sum(1)


class LinearProbes(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "linear_probes"
    prefix = "probe/linear"
    headline = "adapted"
    needs = frozenset({HIDDEN})
    tier = RARE
    inert = frozenset({"values_read", "values_left_out", "records_without"})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._layers: list[int] = []

    def prepare(self, vlm: VLM) -> None:
        """Choose the blocks."""
        count = min(self.settings.layers, len(vlm.layers))
        spaced = np.linspace(len(vlm.layers) / count, len(vlm.layers), count).round() - 1
        self._layers = spaced.astype(int).tolist()

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Keeps the states of one batch."""
        return _States(batch, self._layers)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """States of both sides and the facts, by item."""
        assert isinstance(before, _States) and isinstance(after, _States)
        return [
            {
                "index": item.index,
                "facts": facts_of(item),
                "base": np.stack([before.held[item.index, n] for n in self._layers]),
                "adapted": np.stack([after.held[item.index, n] for n in self._layers]),
            }
            for item in batch.items
        ]

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Over the set, by group, source and layer, and the mean over layers."""
        records = sorted((v for rank in values for v in rank), key=lambda v: v["index"])
        states = {side: np.stack([r[side] for r in records]) for side in ("base", "adapted")}
        made = []
        for kind in KINDS:
            facts = [record["facts"][kind] for record in records]
            asked, left_out = questions(facts, self.settings.minimum, self.settings.values)
            known = sum(each is not None for each in facts)
            counts = {
                "values_read": len(asked),
                "values_left_out": left_out,
                "records_without": len(facts) - known,
            }
            made += [
                ProbeReading(
                    step=step,
                    probe=self.name,
                    metric=metric,
                    side="base",
                    record="",
                    group=kind,
                    value=float(value),
                    n=len(facts),
                )
                for metric, value in counts.items()
            ]
            whole = all(np.isfinite(each).all() for each in states.values())
            # Hundreds of small fits: sklearn's checks of what is checked here cost more than they.
            with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
                found = (
                    self._of_kind(states, asked, kind) if asked and whole else self._nothing(kind)
                )
            for side, estimates in found.items():
                fixed: dict[str, Any] = {"step": step, "probe": self.name, "side": side}
                made += _sets.to_readings(estimates, n=known if asked else 0, **fixed)
        return made

    def _nothing(self, kind: str) -> dict[str, dict[Key, Estimate]]:
        nan = Estimate(float("nan"))
        sides = ("base", "adapted", "delta")
        return {side: {(source, kind, -1): nan for source in SOURCES} for side in sides}

    def _of_kind(
        self, states: dict[str, np.ndarray], asked: dict[str, np.ndarray], kind: str
    ) -> dict[str, dict[Key, Estimate]]:
        """Side -> estimates. ``states``: (records, layers, sources, width) of each side."""
        count = len(states["base"])
        rng = np.random.default_rng(0)
        drawn_BN = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(float)
        drawn_BN = np.concatenate([np.ones((1, count)), drawn_BN])
        made: dict[str, dict[Key, Estimate]] = {side: {} for side in ("base", "adapted", "delta")}
        for number, source in enumerate(SOURCES):
            curves: dict[tuple[str, str], list[np.ndarray]] = {}
            for layer in range(len(self._layers)):
                sides = (states[side][:, layer, number] for side in ("base", "adapted"))
                old, new = in_own_span(*sides)
                scored = _scores(old, new, asked, drawn_BN, source)
                scored["delta", source] = scored["adapted", source] - scored["base", source]
                for name, curve_B in scored.items():
                    curves.setdefault(name, []).append(curve_B)
            for (side, metric), each in curves.items():
                for layer, curve_B in zip(
                    (-1, *self._layers), (np.mean(each, axis=0), *each), strict=True
                ):
                    low, high = np.nanpercentile(curve_B[1:], [2.5, 97.5])
                    estimate = Estimate(float(curve_B[0]), float(low), float(high))
                    made[side][metric, kind, layer] = estimate
        return made


def in_own_span(old_ND: np.ndarray, new_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in a basis of what they span together: at most 2 N wide, and the same ridge probes.

    A ridge fit depends on inner products alone.
    """
    both = np.concatenate([old_ND, new_ND]).astype(np.float64)
    both -= both.mean(0)
    left, singular, _ = np.linalg.svd(both, full_matrices=False)
    old, new = np.split(left * singular, 2)
    return old, new


def _scores(
    old_ND: np.ndarray,
    new_ND: np.ndarray,
    asked: dict[str, np.ndarray],
    drawn_BN: np.ndarray,
    source: str,
) -> dict[tuple[str, str], np.ndarray]:
    """(side, metric) -> (B,): the score of the set, then of every bootstrap sample."""
    true_VN = np.stack(list(asked.values()))
    control_VN = np.stack([_shuffled(value, labels) for value, labels in asked.items()])
    # Real and shuffled questions side by side: one fit answers all of them.
    both_VN, half = np.concatenate([true_VN, control_VN]), len(true_VN)
    base, fixed = held_out(old_ND, [old_ND, new_ND], both_VN)
    (adapted,) = held_out(new_ND, [new_ND], both_VN)
    return {
        ("base", source): balanced(base[:half], true_VN, drawn_BN),
        ("adapted", source): balanced(adapted[:half], true_VN, drawn_BN),
        ("adapted", f"{source}_fixed"): balanced(fixed[:half], true_VN, drawn_BN),
        ("base", f"{source}_control"): balanced(base[half:], control_VN, drawn_BN),
        ("adapted", f"{source}_control"): balanced(adapted[half:], control_VN, drawn_BN),
    }


def _shuffled(value: str, labels_N: np.ndarray) -> np.ndarray:
    """The labels exchanged over the records that have one, always in the same way."""
    control_N, known = labels_N.copy(), labels_N >= 0
    rng = np.random.default_rng(zlib.crc32(value.encode()))
    control_N[known] = rng.permutation(labels_N[known])
    return control_N


METHOD = LinearProbes
