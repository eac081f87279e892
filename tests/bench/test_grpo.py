"""The loss step of a group: three sides on one rollout, and what tells them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlalign.bench import grpo, works
from mlalign.bench.setting import Setting, image_size, new_group, new_vlm
from mlalign.bench.side import compare

SETTING = Setting(
    layers=2,
    width=64,
    intermediate=128,
    heads=4,
    vocabulary=1000,
    tower_layers=2,
    tower_width=64,
    rank=4,
    completions=(4, 12),
    group=3,
)


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return grpo.sides(SETTING, grpo.KL)


def test_token_counts_are_those_of_the_setting() -> None:
    setting = SETTING.at(completions=(7, 7), prefix=590, group=5)
    vlm = new_vlm(setting)
    group = new_group(setting, vlm)
    assert len(vlm.prefix_ids(group.example.prompt, image_size(setting))) == 590
    assert [len(ids) for ids in group.completions] == [7] * 5
    assert len({tuple(ids) for ids in group.completions}) == len(set(group.rewards)) == 5
    assert {ids[-1] for ids in group.completions} == {vlm.tokenizer.eos_token_id}


def test_all_sides_do_the_same(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions of unequal length, so that padding and the mean over tokens count."""
    lengths = {len(ids) for ids in made["shared"].group.completions}
    assert len(lengths) > 1
    monkeypatch.setattr(grpo, "sides", lambda *_: made)
    monkeypatch.setattr(works, "alternate", lambda sides, *_: {name: [1.0] for name in sides})
    rows = works.grpo_rows("x", SETTING, grpo.KL, rounds=1)
    assert [row.opponent for row in rows] == ["stock", "padded"]
    for row in rows:
        assert not row.invalid and row.margin is not None and row.margin > 0.01
        assert row.loss_max_abs_diff is not None and row.loss_max_abs_diff <= 1e-5
        assert row.grad_rel_diff is not None and row.grad_rel_diff <= 1e-4
    assert rows[0].ceiling is None and rows[1].ceiling is not None and rows[1].ceiling > 1.5


def test_the_sides_are_laid_out_as_they_say(made: dict[str, Any]) -> None:
    rows = {}
    for name in ("shared", "padded"):
        roller = made[name].roller
        batch = roller.rows(roller.completions)
        rows[name] = len(batch.input_ids_RT)
        assert len(batch.images["pixel_values"]) == 1  # one tower call
    assert rows == {"shared": 1, "padded": SETTING.group}
    stock = made["stock"]
    assert len(stock.inputs["pixel_values"]) == SETTING.group
    assert stock.inputs["prompt_ids"].shape == (SETTING.group, SETTING.prefix)


def test_the_reference_pass_is_part_of_every_step(made: dict[str, Any]) -> None:
    """A step with another reference has another loss: nothing of the last one is kept."""
    for name, side in made.items():
        before = side.step()
        core: Any = side.trainer.accelerator.unwrap_model(side.trainer.model).get_base_model()
        weight = core.get_output_embeddings().weight
        with torch.no_grad():
            weight.mul_(1.5)
        try:
            assert abs(side.step() - before) > 1e-6, name
        finally:
            with torch.no_grad():
                weight.div_(1.5)


def test_other_advantages_are_found_out(made: dict[str, Any]) -> None:
    """Whose log-probs agree may still train on something else."""
    stock = made["stock"]
    kept = stock.inputs
    stock.inputs = {**kept, "advantages": kept["advantages"].flip(0)}
    try:
        assert compare(made["shared"], stock)["grad_rel_diff"] > 1e-2
    finally:
        stock.inputs = kept
