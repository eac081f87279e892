"""DPO end to end on a small model of every family, and the adapter in PEFT's own hands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mlalign import store
from mlalign.branching.logps import completion_logps
from mlalign.images import open_image
from mlalign.models.loading import load_vlm_from
from mlalign.recipe import from_dict
from mlalign.train import launch
from mlalign.train.preference import train_arm
from tests.models import exact
from tests.models.folders import BUILD
from tests.train.pairs import shaped_pairs


def dpo(model: Path, pairs: Path, **train: Any) -> Any:
    """A recipe of four steps."""
    return from_dict(
        {
            "name": "families",
            "model": {"path": str(model), "dtype": "float32", "adapter": {"rank": 4, "alpha": 16}},
            "data": {"pairs": {"arm": str(pairs)}},
            "train": {
                "objective": "dpo",
                "learning_rate": 2e-3,
                "batch_size": 4,
                "micro_batch_size": 2,
                "steps": 4,
                **train,
            },
            "launch": {"launcher": "none"},
        }
    )


@pytest.mark.parametrize("family", BUILD)
def test_an_adapter_trains_and_peft_reloads_it(family: str, tmp_path: Path) -> None:
    folder = BUILD[family](tmp_path / "model")
    pairs = shaped_pairs(4)
    store.write_preferences(tmp_path / "pairs", pairs, {})
    trainer = train_arm(dpo(folder, tmp_path / "pairs"), "arm", tmp_path / "run")
    rows = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(0.693147, abs=1e-4) and losses[-1] < losses[0] - 0.01
    tower = trainer.vlm.family.frozen_towers(trainer.vlm.core)
    assert not any(p.requires_grad for part in tower for p in part.parameters())

    trained: Any = trainer.model
    trained.eval()
    made = trainer.data_collator.pairs  # type: ignore[union-attr]
    batch = trainer.vlm.encode(trainer.data_collator.collate(made))  # type: ignore[union-attr]
    with torch.no_grad():
        ours = completion_logps(trained, batch)
        with trained.disable_adapter():
            before = completion_logps(trained, batch)
    assert (ours.logps_CS - before.logps_CS).abs().max() > 1e-2
    launch.forget(trainer)

    stock: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(stock, str(tmp_path / "run/arm/adapter")).eval()
    vlm = dataclasses.replace(load_vlm_from(folder, dtype="float32"), model=reloaded)
    for number, each in enumerate(made):
        image = open_image(each.pair.image, each.pair.id)
        for side, ids in enumerate((each.chosen, each.rejected)):
            place = 2 * number + side
            actual = ours.logps_CS[place][ours.mask_CS[place]]
            torch.testing.assert_close(
                actual, _stock(vlm, each.prefix, ids, image), atol=1e-4, rtol=0
            )


def _stock(vlm: Any, prefix: list[int], ids: list[int], image: Any) -> Tensor:
    """Log-probs of the ids by a plain forward over pixels."""
    with torch.no_grad():
        whole = exact.stock_logps(vlm, prefix, ids, image)[len(prefix) - 1 : -1]
    return whole.gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("family", "save"),
    [
        ("qwen3_vl", ("merger", "deepstack_merger_list.0", "deepstack_merger_list.1")),
        ("idefics3", ("connector",)),
        ("gemma3", ("multi_modal_projector",)),
    ],
)
def test_a_projector_trains_beside_lora(family: str, save: tuple[str, ...], tmp_path: Path) -> None:
    folder = BUILD[family](tmp_path / "model")
    store.write_preferences(tmp_path / "pairs", shaped_pairs(4), {})
    recipe = dpo(folder, tmp_path / "pairs", gradient_checkpointing=True)
    adapter = recipe.model.adapter.model_copy(update={"modules_to_save": save})
    model = recipe.model.model_copy(update={"adapter": adapter})
    trainer = train_arm(recipe.model_copy(update={"model": model}), "arm", tmp_path / "run")
    core = trainer.vlm.core
    for name in trainer.vlm.family.projectors(core):
        wrapper = core.get_submodule(name)
        pairs = zip(
            wrapper.modules_to_save["default"].parameters(),
            wrapper.original_module.parameters(),
            strict=True,
        )
        assert all(not torch.equal(tuned, start) for tuned, start in pairs), name
    launch.forget(trainer)
