"""Supervised fine-tuning of a LLaVA on dialogues, through TRL's SFTTrainer.

The loss is the mean over the assistant's tokens (``sft_data``). Serves any
``LlavaForConditionalGeneration`` with its processor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.nn import functional as F
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from mlalign.records import Dialogue
from mlalign.train.sft_data import IGNORE, SftCollator
from mlalign.train.sft_features import FeatureCache, projector_of


class SftSettings(BaseModel):
    """How to fine-tune; the ``sft`` part of a recipe."""

    model_config = ConfigDict(extra="forbid")

    trainable: Literal["all", "projector", "lora+projector"] = "all"
    """What is trained. ``projector``: the two layers between tower and language model alone."""
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: str = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    """Regular expression over whole module names. It names the language model: "all-linear" would
    also hit the vision tower."""
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; set this or ``epochs``."""
    epochs: float | None = Field(default=None, gt=0)
    batch: int = Field(default=8, ge=1)
    """Dialogues per forward pass and process."""
    accumulate: int = Field(default=1, ge=1)
    """Forward passes per optimiser step."""
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(default=1.0, gt=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: frozen weights are stored in it and arithmetic is done in it (autocast); what is
    trained stays float32."""
    seed: int = 0
    cache_features: bool = False
    """Keep what the frozen tower makes of each image (in memory, bfloat16) instead of running it
    again in every epoch."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens, image tokens included; a longer dialogue is an error."""
    workers: int = Field(default=0, ge=0)
    log_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _check(self) -> SftSettings:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("sft: set exactly one of steps and epochs")
        if self.cache_features and self.trainable == "all":
            raise ValueError("sft.cache_features: the tower is trained, so its features change")
        return self


def train_sft(
    model: Any,
    processor: Any,
    dialogues: Sequence[Dialogue],
    settings: SftSettings,
    out_dir: str | Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """Fine-tune ``model`` in place and return it (a PeftModel where an adapter was added).

    ``dialogues`` may make its items when asked for them. Metrics go to ``out_dir/sft.jsonl`` under
    TRL's names. Nothing else is written: saving is the caller's. Raises RecordError for a dialogue
    that cannot be used.
    """
    if not len(dialogues):
        raise ValueError("sft: no dialogue to train on")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    cache = FeatureCache(model) if settings.cache_features else None
    peft_config = _prepare(model, settings)
    collate = SftCollator(processor, settings.max_length, cache)
    trainer = _Trainer(
        model=model,
        args=_arguments(settings, out),
        # numbers, of which the collator makes dialogues; "images" tells TRL: a vision set
        train_dataset=Dataset.from_dict({"images": range(len(dialogues))}),
        processing_class=processor,
        data_collator=lambda rows: collate([dialogues[row["images"]] for row in rows]),
        peft_config=peft_config,
        callbacks=[_Jsonl(out / "sft.jsonl"), *callbacks],
    )
    trainer.feature_cache = cache
    try:
        trainer.train()
    finally:  # TRL puts a forward of its own on the model: take it off again
        vars(model).pop("forward", None)
    return trainer.model


def _prepare(model: Any, settings: SftSettings) -> LoraConfig | None:
    """Freeze what is not trained and set the dtypes. Returns the adapter to add, if any."""
    model.requires_grad_(settings.trainable == "all")
    if settings.trainable != "all":
        if settings.dtype == "bfloat16":
            model.to(torch.bfloat16)
        projector_of(model).float().requires_grad_(settings.trainable == "projector")
    if settings.trainable != "lora+projector":
        return None
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_targets,
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )


def _arguments(settings: SftSettings, out: Path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(out),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,  # below 1: a share of all steps
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.dtype == "bfloat16",
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        max_length=None,
        remove_unused_columns=False,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=False,
        logging_steps=settings.log_every,
        save_strategy="no",
        report_to=[],
    )


class _Trainer(SFTTrainer):
    """SFTTrainer whose logits are made only where some row has a label."""

    feature_cache: FeatureCache | None = None

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        if self.feature_cache is not None:
            self.feature_cache.put_features(model, inputs)
        columns = (labels != IGNORE).any(dim=0).nonzero().squeeze(1)
        outputs = model(**inputs, logits_to_keep=columns, use_cache=False)
        kept = labels[:, columns].reshape(-1)
        logits = outputs.logits.float().flatten(0, 1)
        total = F.cross_entropy(logits, kept, ignore_index=IGNORE, reduction="sum")
        valid = kept != IGNORE
        loss = total / (valid.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None:  # it counts all processes' tokens; DDP averages
            loss = loss * self.accelerator.num_processes
        right = (logits.detach().argmax(-1) == kept) & valid
        mode = "train" if model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append(
            (right.sum() / valid.sum().clamp(min=1)).item()
        )
        return (loss, outputs) if return_outputs else loss


class _Jsonl(TrainerCallback):
    """One line of metrics per log, TRL's names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.write_text("")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
