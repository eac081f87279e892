"""Supervised fine-tuning of a vision-language model on dialogues, through TRL's SFTTrainer.

The loss is the mean over the assistant's tokens (``sft_data``) of an optimiser step, over its
micro-batches and processes. Serves every family of mlalign/models with its processor.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from mlalign.branching.attention import refuse, using
from mlalign.branching.logps import completion_logps
from mlalign.models._vlm import VLM
from mlalign.models.loading import family_named
from mlalign.records import Dialogue
from mlalign.train.sft_data import SftCollator
from mlalign.train.sft_features import FeatureCache


class SftSettings(BaseModel):
    """How to fine-tune; the ``sft`` part of a recipe."""

    model_config = ConfigDict(extra="forbid")

    trainable: Literal["all", "projector", "lora+projector"] = "all"
    """What is trained. ``projector``: what stands between tower and language model, alone."""
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: str | None = None
    """Regular expression over whole module names; None: every linear of the language model's
    blocks. "all-linear" would also hit the vision tower."""
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
    TRL's names. Nothing else is written: saving is the caller's. Raises ModelError for a model
    that no family serves; RecordError and LayoutError, naming it, for a dialogue that cannot be
    used.
    """
    if not len(dialogues):
        raise ValueError("sft: no dialogue to train on")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    vlm = VLM(model, processor, family_named(type(model).__name__), name=type(model).__name__)
    cache = FeatureCache(vlm) if settings.cache_features else None
    peft_config = _prepare(vlm, settings)
    collate = SftCollator(vlm, settings.max_length)
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
    trainer.vlm, trainer.feature_cache = vlm, cache
    try:
        with _attending(model):
            trainer.train()
    finally:  # TRL puts a forward of its own on the model: take it off again
        vars(model).pop("forward", None)
    return trainer.model


def _prepare(vlm: VLM, settings: SftSettings) -> LoraConfig | None:
    """Freeze what is not trained and set the dtypes. Returns the adapter to add, if any."""
    model, projectors = vlm.model, vlm.family.projectors(vlm.model)
    model.requires_grad_(settings.trainable == "all")
    if settings.trainable != "all":
        if settings.dtype == "bfloat16":
            _cast(model, torch.bfloat16)
        for name in projectors:
            projector = model.get_submodule(name)
            _cast(projector, torch.float32)
            projector.requires_grad_(settings.trainable == "projector")
    if settings.trainable != "lora+projector":
        return None
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_targets or vlm.family.lora_targets(model),
        modules_to_save=projectors,
        task_type="CAUSAL_LM",
    )


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """The parameters only: rotary frequencies, which are buffers, lose a position in bfloat16."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _attending(model: Any) -> contextlib.AbstractContextManager[None]:
    """The project's attention function, where the model's own can be exchanged for it."""
    try:
        refuse(model)
    except ValueError:
        return contextlib.nullcontext()
    return using(model)


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
    """SFTTrainer on rows of ``branching``: the head runs only where a token carries loss."""

    # The loss is already divided by the tokens of the whole step.
    loss_is_scaled_for_ga = True

    vlm: VLM
    feature_cache: FeatureCache | None = None

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        batch = inputs["batch"].to(self.accelerator.device)
        if self.feature_cache is not None:
            batch = self.feature_cache.encode(model, batch, inputs["image_keys"])
        out = completion_logps(model, self.vlm.encode(batch, model))
        tokens = out.mask_CS.sum()
        world = self.accelerator.num_processes
        total = tokens * world if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes, so each one's sum counts `world` times.
        loss = -out.sum_C().sum() * world / total
        mode = "train" if model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append((out.top1_CS.sum() / tokens).item())
        return (loss, out) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Tokens with loss of the optimiser step, over its micro-batches and all processes."""
        tokens = sum(int(sample["batch"].mask_CS.sum()) for sample in batch_samples)
        counts: Any = self.accelerator.gather(torch.tensor(tokens, device=device))
        return counts.sum()


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
