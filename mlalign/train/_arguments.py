"""What every trainer here is told, from a recipe: arguments of transformers' ``Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlalign.models.loading import dtype_of
from mlalign.recipe import Recipe
from mlalign.train import launch


def shared_arguments(recipe: Recipe, folder: Path, *, per: int = 1) -> dict[str, Any]:
    """Keywords for ``TrainingArguments`` and TRL's configurations of it.

    ``per``: sequences that the trainer counts for each item of ``train.batch_size``. No default
    that changes a result is left unsaid. Raises LaunchError for a batch that does not divide, and
    for float16.
    """
    train = recipe.train
    processes = launch.world_size()
    if dtype_of(recipe.model) == torch.float16:
        raise launch.LaunchError(
            "model.dtype: float16 would train without loss scaling, and small gradients vanish. "
            "Train in bfloat16, or in float32 where the hardware has none"
        )
    return {
        "output_dir": str(folder / "checkpoints"),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "learning_rate": train.learning_rate,
        "per_device_train_batch_size": train.micro_batch_size * per,
        "gradient_accumulation_steps": launch.accumulation(
            train.batch_size, train.micro_batch_size, processes
        ),
        "num_train_epochs": train.epochs or 1.0,
        "max_steps": train.steps or -1,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "max_grad_norm": train.max_grad_norm,
        # auto is decided once the lengths of the data are known.
        "gradient_checkpointing": train.gradient_checkpointing is True,
        "logging_steps": train.log_every,
        "logging_first_step": True,
        "save_strategy": "steps" if train.save_every else "no",
        "save_steps": train.save_every or 500,
        "report_to": recipe.report_to,
        "run_name": f"{recipe.name}/{folder.name}",
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "deepspeed": launch.deepspeed_config(recipe.launch)
        if recipe.launch.launcher != "none"
        else None,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": dtype_of(recipe.model) == torch.bfloat16,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": processes > 1 and launch.rank() != 0,
    }
