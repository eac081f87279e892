"""Objectives against the installed TRL: loss, gradients and rewards, on one model and adapter.

TRL runs as it is, with the ``loss_type`` that each objective's file names, on four pairs of unequal
lengths and a non-zero adapter, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from mlalign import methods
from mlalign.branching.batch import ObjectiveOut, PrefixBatch
from mlalign.branching.logps import completion_logps
from mlalign.train.trainer import PreferenceTrainer
from tests.train import test_equality as equality

PAIRS = 4
FROM_CONFIG = ("loss_types", "loss_weights", "beta", "label_smoothing")
"""What DPOTrainer takes from its config for the loss: set here for each case, on one trainer."""


@dataclass(frozen=True)
class Case:
    """An objective with its settings, and what TRL calls the same."""

    name: str
    settings: dict[str, Any]
    loss_type: list[str]
    beta: float
    theirs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.beta}"


def _mpo(beta: float, average: str) -> dict[str, Any]:
    return {
        "parts": [
            {"name": "dpo", "weight": 0.8, "beta": beta},
            {"name": "bco_pair", "weight": 0.2, "beta": beta},
            {"name": "sft", "weight": 1.0, "average": average},
        ]
    }


MPO = ["sigmoid", "bco_pair", "sft"]
CASES = [
    Case("ipo", {"beta": 0.5}, ["ipo"], 0.5),
    Case("ipo", {"beta": 0.1}, ["ipo"], 0.1),
    Case("hinge", {"beta": 0.1}, ["hinge"], 0.1),
    Case(
        "robust",
        {"beta": 0.1, "label_smoothing": 0.2},
        ["robust"],
        0.1,
        {"label_smoothing": 0.2},
    ),
    Case("dpo_mean", {"beta": 5.0}, ["sigmoid_norm"], 5.0),
    Case("bco_pair", {"beta": 0.1}, ["bco_pair"], 0.1),
    Case("sft", {"average": "batch"}, ["sft"], 1.0),
    Case(
        "dpo_sft",
        {"beta": 0.1, "sft_weight": 0.3, "average": "batch"},
        ["sigmoid", "sft"],
        0.1,
        {"loss_weights": [1.0, 0.3]},
    ),
    Case("mpo", _mpo(0.1, "batch"), MPO, 0.1, {"loss_weights": [0.8, 0.2, 1.0]}),
]
OWN_MEAN = [
    Case("sft", {}, ["sft"], 1.0),
    Case(
        "dpo_sft",
        {"beta": 0.1, "sft_weight": 0.3},
        ["sigmoid", "sft"],
        0.1,
        {"loss_weights": [1.0, 0.3]},
    ),
    Case("mpo", _mpo(0.1, "pair"), MPO, 0.1, {"loss_weights": [0.8, 0.2, 1.0]}),
]
"""Each answer's own mean: TRL's number where it sees one pair at a time."""


@dataclass(frozen=True)
class Two:
    """Both trainers, from one start, each with its batch of the same four pairs."""

    stock: DPOTrainer
    theirs: dict[str, torch.Tensor]
    ours: PreferenceTrainer
    batch: PrefixBatch


@pytest.fixture(scope="module")
def two(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Two:
    for case in CASES:  # before the trainers: a new config resets accelerate's state
        config = _config(case, tmp_path_factory.mktemp("config"))
        assert config.loss_type == case.loss_type and config.beta == case.beta
    stock, theirs = equality._stock(tiny_llava, tmp_path_factory.mktemp("stock"), False)
    ours, _ = equality._ours(tiny_llava, tmp_path_factory.mktemp("ours"), False)
    equality._same_start(stock, ours)
    collator: Any = ours.data_collator
    batch = collator.collate(collator.pairs)
    chosen, rejected = batch.mask_CS.sum(-1)[0::2], batch.mask_CS.sum(-1)[1::2]
    assert len(chosen) == PAIRS and len(set(chosen.tolist())) > 1
    assert (chosen != rejected).any()
    return Two(stock, theirs, ours, batch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_gradients_and_rewards_equal_stock_trl(two: Two, case: Case) -> None:
    loss_theirs = _stock_loss(two, case, two.theirs)
    out = _our_out(two, case)
    assert float(out.per_pair_N.detach().mean()) == pytest.approx(loss_theirs, abs=1e-5)
    gradients = equality._gradients(two.ours.model)
    for name, expected in equality._gradients(two.stock.model).items():
        scale = expected.abs().max()
        assert scale > 0, name
        assert (gradients[name] - expected).abs().max() <= 2e-5 * scale, name

    logged = two.stock._metrics["train"]
    for name, value in {
        "rewards/chosen": out.chosen_rewards_N,
        "rewards/rejected": out.rejected_rewards_N,
        "rewards/margins": out.margins_N,
    }.items():
        # 1e-4 nats: rounding of a sum over a completion's tokens.
        near = pytest.approx(logged[name][-1], abs=1e-4 * case.beta)
        assert float(value.mean()) == near, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_neither_sigmoids_nor_that_of_a_fresh_adapter(two: Two, case: Case) -> None:
    """Else a loss type that TRL ignores, or any layout, would agree."""
    loss = _stock_loss(two, case, two.theirs)
    plain = Case("dpo", {"beta": case.beta}, ["sigmoid"], case.beta)
    assert abs(loss - _stock_loss(two, plain, two.theirs)) > 1e-3
    at_reference = getattr(_objective(case), "at_reference", None)
    assert at_reference is None or abs(loss - at_reference) > 1e-3


@pytest.mark.parametrize("case", OWN_MEAN, ids=str)
def test_an_answers_own_mean_is_trl_pair_by_pair(two: Two, case: Case) -> None:
    alone = [_stock_loss(two, case, _one_pair(two, pair)) for pair in range(PAIRS)]
    ours = _our_out(two, case).per_pair_N.detach()
    assert ours.tolist() == pytest.approx(alone, abs=1e-5)
    whole = _stock_loss(two, case, two.theirs)
    assert abs(float(ours.mean()) - whole) > 1e-4, "these lengths do not tell the two means apart"


def _objective(case: Case) -> Any:
    method = methods.find("mlalign.objectives", case.name)
    return method(method.Settings.model_validate(case.settings))


def _config(case: Case, folder: Path) -> DPOConfig:
    """What a user of TRL writes for the case; raises where TRL does not know a key."""
    return DPOConfig(
        output_dir=str(folder),
        loss_type=case.loss_type,
        beta=case.beta,
        bf16=False,
        use_cpu=True,
        **case.theirs,
    )


def _our_out(two: Two, case: Case) -> ObjectiveOut:
    """Our objective on the whole batch; leaves the gradients of its mean on the model."""
    two.ours.model.zero_grad()
    two.ours.model.train()
    policy = completion_logps(two.ours.model, two.ours.vlm.encode(two.batch))
    out = _objective(case)(policy, two.ours.reference_logps(two.batch))
    out.per_pair_N.mean().backward()
    return out


def _stock_loss(two: Two, case: Case, batch: dict[str, torch.Tensor]) -> float:
    """TRL's loss; leaves its gradients on the model."""
    stock = two.stock
    for name in FROM_CONFIG:
        assert hasattr(stock, name), f"TRL has renamed {name}"
    stock.loss_types, stock.beta = case.loss_type, case.beta
    stock.loss_weights = case.theirs.get("loss_weights", [1.0] * len(case.loss_type))
    stock.label_smoothing = case.theirs.get("label_smoothing", 0.0)
    stock.model.zero_grad()
    stock.model.train()
    loss = stock.compute_loss(stock.model, batch)
    loss.backward()
    return float(loss.detach())


def _one_pair(two: Two, pair: int) -> dict[str, torch.Tensor]:
    """TRL's batch holds all chosen, then all rejected; one image each."""
    assert all(len(value) == 2 * PAIRS for value in two.theirs.values())
    return {key: value[[pair, PAIRS + pair]] for key, value in two.theirs.items()}
