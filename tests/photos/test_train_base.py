"""The surrogate's training: the loss of a laid-out row is that of its branches alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

from mlalign.photos.sft_data import Row
from mlalign.photos.train_base import BaseRecipe, Stage, Trainer


@pytest.fixture
def trainer(vlm, tmp_path: Path) -> Trainer:
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    names = [f"{i}.jpg" for i in range(6)]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    captions = [{"image": n, "captions": ["A dog .", "A brown dog on grass ."]} for n in names]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    (folder / "train.txt").write_text("\n".join(names))
    stage = Stage(learning_rate=1e-2, steps=3, warmup=1, rows=2)
    recipe = BaseRecipe(
        data=str(folder), projector=stage, lora=stage, dtype="float32", held_out=2,
        sample_every=100, save_every=100,
    )  # fmt: skip
    return Trainer(vlm, recipe, tmp_path)


def test_loss_is_that_of_separate_rows(vlm, trainer: Trainer) -> None:
    branches = (("Describe.", "A dog."), ("Is it red?", "No"), ("And?", "A brown dog on grass."))
    loss, tokens, _ = trainer.loss([Row("0.jpg", branches)])
    vlm.core.set_attn_implementation({"text_config": "sdpa"})
    total, count = 0.0, 0
    for prompt, answer in branches:
        prefix, (completion,) = vlm.branch_ids(prompt, [answer], (96, 96))
        ids = torch.tensor([[*prefix, *completion]])
        pixels = vlm.image(Image.open(Path(trainer.recipe.data) / "images" / "0.jpg")).tensors[
            "pixel_values"
        ][0]
        with torch.no_grad():
            logits = vlm.model(input_ids=ids, pixel_values=pixels[None]).logits[0].float()
        target = ids[0, len(prefix) :]
        total += float(F.cross_entropy(logits[len(prefix) - 1 : -1], target, reduction="sum"))
        count += len(completion)
    assert tokens == count
    assert float(loss.detach()) == pytest.approx(total / count, abs=1e-4)


def test_trains_the_projector_and_saves_it(vlm, trainer: Trainer, tmp_path: Path) -> None:
    vlm.model.requires_grad_(False)
    projector = vlm.core.model.multi_modal_projector.requires_grad_(True)
    before = projector.linear_1.weight.detach().clone()
    trainer.run("projector", trainer.recipe.projector, list(projector.parameters()))
    assert not torch.equal(before, projector.linear_1.weight)
    assert (tmp_path / "projector.safetensors").is_file()
    log = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]


def test_the_recipe_in_the_repository(repository: Path) -> None:
    raw = yaml.safe_load((repository / "recipes" / "photos" / "base.yaml").read_text())
    assert BaseRecipe.model_validate(raw).rank == 28
