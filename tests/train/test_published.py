"""Published systems: released rows to records to one step, against the formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlalign import methods
from mlalign.branching.batch import TokenLogps
from mlalign.records import Preference
from tests.data_builders.sources.released import FIXTURES, fixture, pairs, parquet, pictures, read
from tests.train.planted import planted


def released(name: str, folder: Path) -> list[Preference]:
    """The pairs of a source's fixture."""
    method = methods.find("data_builders.sources", name)
    vg = ("VG_100K_2/1.jpg", "VG_100K/2.jpg", "VG_100K/3.jpg")
    names = {
        "rlhf_v": ("0.jpg",),
        "povid": ("000000000025.jpg", "COCO_train2014_000000000030.jpg"),
        "mdpo": tuple(row.get("img_path", "x") for row in fixture("mdpo.json")),
        "vlfeedback": ("llava-1.jpg", *(f"svit-{n}.jpg" for n in range(2, 8))),
        "ha_dpo": vg,
    }
    files = {
        "rlhf_v": lambda: parquet(folder / "v.parquet", fixture("rlhf_v_rows.json")),
        "povid": lambda: FIXTURES / "povid.json",
        "mdpo": lambda: FIXTURES / "mdpo.json",
        "vlfeedback": lambda: FIXTURES / "vlfeedback_80k.jsonl",
        "ha_dpo": lambda: FIXTURES,
        "rlaif_v": lambda: next(
            parquet(folder / "data" / f"RLAIF-V-Dataset_{number}.parquet", rows).parent
            for number, rows in fixture("rlaif_v_shards.json").items()
        ),
    }
    keys: dict[str, str] = {"path": str(files[name]())}
    if name in names:
        keys["images"] = str(pictures(folder / "images", *names[name]))
    if name == "ha_dpo":
        keys["index"] = str(FIXTURES / "image_data.json")
    return list(pairs(read(method(method.Settings(**keys)))).values())


def soft(value: float) -> float:
    """-log sigmoid."""
    return math.log1p(math.exp(-value))


Ratios = Callable[[TokenLogps, TokenLogps, int], float]


def summed(policy: TokenLogps, reference: TokenLogps, row: int) -> float:
    """Log-ratio of one completion, token by token in float64."""
    return math.fsum(
        float(policy.logps_CS[row, t].double()) - float(reference.logps_CS[row, t].double())
        for t in range(policy.mask_CS.shape[1])
        if policy.mask_CS[row, t]
    )


def dense(policy: TokenLogps, reference: TokenLogps, row: int, gamma: float) -> float:
    """DDPO's score difference of one completion."""
    assert policy.edited_CS is not None
    total, weights = 0.0, 0.0
    for t in range(policy.mask_CS.shape[1]):
        if policy.mask_CS[row, t]:
            weight = gamma if policy.edited_CS[row, t] > 0 else 1.0
            apart = policy.logps_CS[row, t].double() - reference.logps_CS[row, t].double()
            total += weight * float(apart)
            weights += weight
    return total / weights


def rlhf_v(policy: TokenLogps, reference: TokenLogps, pair: int) -> float:
    scores = [dense(policy, reference, 2 * pair + side, 5.0) for side in (0, 1)]
    return soft(0.5 * (scores[0] - scores[1]))


def povid(policy: TokenLogps, reference: TokenLogps, pair: int) -> float:
    chosen, rejected = (summed(policy, reference, 2 * pair + side) for side in (0, 1))
    noisy = summed(policy.views["noisy"], reference.views["noisy"], pair)
    return soft(0.1 * (chosen - 0.5 * rejected - 0.5 * noisy))


def mdpo(policy: TokenLogps, reference: TokenLogps, pair: int) -> float:
    chosen, rejected = (summed(policy, reference, 2 * pair + side) for side in (0, 1))
    other = summed(policy.views["other_image"], reference.views["other_image"], pair)
    return soft(0.1 * (chosen - rejected)) + soft(0.1 * (chosen - other)) + soft(0.1 * chosen)


def dpo(policy: TokenLogps, reference: TokenLogps, pair: int) -> float:
    chosen, rejected = (summed(policy, reference, 2 * pair + side) for side in (0, 1))
    return soft(0.1 * (chosen - rejected))


SYSTEMS = {
    "ha_dpo": ("dpo", dpo),
    "rlaif_v": ("dpo", dpo),
    "vlfeedback": ("dpo", dpo),
    "rlhf_v": ("ddpo", rlhf_v),
    "povid": ("povid", povid),
    "mdpo": ("mdpo", mdpo),
}
"""Source -> objective with its defaults, the published formula."""


@pytest.mark.parametrize("system", SYSTEMS)
def test_from_released_rows_to_the_loss(system: str, tiny_llava: Path, tmp_path: Path) -> None:
    name, formula = SYSTEMS[system]
    method = methods.find("mlalign.objectives", name)
    records = released(system, tmp_path)
    trainer = planted(tiny_llava, tmp_path / "run", method(method.Settings()), records)
    collator: Any = trainer.data_collator
    batch = collator.collate(collator.pairs)
    with torch.no_grad():
        _, policy, reference, out = trainer.outputs(trainer.model, batch)
    assert batch.num_pairs >= 1 and (policy.logps_CS - reference.logps_CS).abs().max() > 1e-3
    expected = [formula(policy, reference, pair) for pair in range(batch.num_pairs)]
    assert out.per_pair_N.tolist() == pytest.approx(expected, abs=1e-6)
    if system == "rlhf_v":
        assert policy.edited_CS is not None and (policy.edited_CS > 0).any()
    trainer.gate = None
    loss = trainer.compute_loss(trainer.model, {"batch": batch})
    assert float(loss.detach()) == pytest.approx(math.fsum(expected) / batch.num_pairs, abs=1e-6)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in trainer.model.parameters())
