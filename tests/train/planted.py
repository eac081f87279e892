"""A preference trainer of few pairs with a non-zero adapter: a fresh one makes any layout agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig

from mlalign.data.collate import Collator, tokenise
from mlalign.models.loading import load_vlm_from, lora_config
from mlalign.records import Preference
from mlalign.runlog import RunLog
from mlalign.sections import LoraSection
from mlalign.train.trainer import PreferenceTrainer
from tests.train.pairs import make_pairs


def planted(
    model: Path,
    folder: Path,
    objective: Any,
    pairs: Sequence[Preference] = (),
    **collator: Any,
) -> PreferenceTrainer:
    """In float32, ready for ``compute_loss``; views are drawn with seed 4."""
    vlm = load_vlm_from(model, dtype="float32")
    edits = getattr(objective, "edits", False)
    tokenised, _ = tokenise(vlm, list(pairs) or make_pairs(3), None, edits=edits)
    views = getattr(objective, "views", ())
    rows = {"index": list(range(len(tokenised))), "images": [[] for _ in tokenised]}
    trainer = PreferenceTrainer(
        model=vlm.model,
        vlm=vlm,
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=len(tokenised),
            max_length=None,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        data_collator=Collator(vlm, tokenised, views=views, seed=4, **collator),
        train_dataset=Dataset.from_dict(rows),
        processing_class=vlm.processor,
        peft_config=lora_config(LoraSection(rank=4), vlm),
        objective=objective,
        log=RunLog(folder, enabled=False),
        arm="arm",
        checkpoint_facts={},
    )
    vlm.model = trainer.accelerator.unwrap_model(trainer.model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    vlm.model.train()
    return trainer
