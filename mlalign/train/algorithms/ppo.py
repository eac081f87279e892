"""PPO, as LLaVA-RLHF ran it (2309.14525; Schulman et al., 1707.06347): see ``ppo_trainer``.

Defaults are those of its released script where it names them: ratio and value clip 0.2, value
coefficient 0.1, two passes over each rollout, KL 0.1 of the clamped estimator, rewards times 10
inside GAE, whitened advantages, one answer to a prompt. ``reward_model`` is also what the value
begins as. ``train.batch_size`` and ``rollout`` count prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from pydantic import Field
from transformers import TrainingArguments

from mlalign import store
from mlalign.credit.gae import Settings as CreditSettings
from mlalign.data.reader import DataError
from mlalign.models._scalar import load_head
from mlalign.models.loading import load_vlm, lora_config
from mlalign.recipe import Recipe
from mlalign.runlog import RunLog
from mlalign.train import launch
from mlalign.train import watching as watch
from mlalign.train._arguments import shared_arguments
from mlalign.train._rewarding import RewardSettings, reward_folder
from mlalign.train._rewarding import build as build_rewards
from mlalign.train._rollout_run import adapter_of, examples_of, prompt_rows, resume
from mlalign.train.ppo_trainer import POLICY, VALUE, ActorCritic, PpoTrainer
from mlalign.train.preference import add_probes
from mlalign.train.reward_scorer import RewardScorer
from mlalign.train.rollouts import Roller, Sampling
from mlalign.train.watching import WatchSettings


class Settings(Sampling, RewardSettings, WatchSettings):
    """Sampling, rewards, credit, losses."""

    group: int = Field(default=1, ge=1)
    rollout: int = Field(default=512, ge=1)
    """Prompts that are answered before training on the answers; a multiple of batch_size."""
    iterations: int = Field(default=2, ge=1)
    """Passes over each rollout."""
    credit: CreditSettings = CreditSettings()
    clip: float = Field(default=0.2, gt=0)
    """Of the policy's ratio."""
    value_clip: float = Field(default=0.2, gt=0)
    vf_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""


class Ppo:
    """The algorithm."""

    Settings = Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def train(self, recipe: Recipe, arm: str, run: Path) -> PpoTrainer:
        """Train the arm on the prompts of ``run/data/<arm>``. Raises DataError, RecipeError,
        LaunchError before the first step."""
        own, folder = self.settings, run / arm
        examples = examples_of(recipe, run / "data" / arm)
        adapter = adapter_of(recipe)
        self._fits(recipe, len(examples))
        launch.join(recipe.launch)
        arguments = TrainingArguments(**shared_arguments(recipe, folder, per=own.group))
        log = RunLog(run, enabled=arguments.process_index == 0)
        vlm = load_vlm(recipe.model)
        torch.manual_seed(recipe.seed)
        vlm.model = get_peft_model(vlm.model, lora_config(adapter, vlm))
        model, score = self._adapters(recipe, vlm)
        roller = Roller(vlm, build_rewards(own, recipe, vlm, score), own, recipe.seed)
        trainer = PpoTrainer(
            model=model,
            args=arguments,
            train_dataset=prompt_rows(len(examples)),
            vlm=vlm,
            roller=roller,
            settings=own,
            examples=examples,
            attention=recipe.train.attention,
            log=log,
            arm=arm,
            checkpoint_facts={
                "data": store.fingerprint(run / "data" / arm),
                "processes": launch.world_size(),
                "batch_size": recipe.train.batch_size,
                "micro_batch_size": recipe.train.micro_batch_size,
                "rollout": own.rollout,
                "seed": recipe.seed,
            },
        )
        if own.watch_every:
            trainer.add_callback(watch.Watch(own, vlm, watch.heldout(run), recipe, log, arm))
        add_probes(recipe, arm, run, trainer, vlm, log)
        resume(trainer, folder, log, arm)
        self._save(trainer, folder)
        return trainer

    def _adapters(self, recipe: Recipe, vlm: Any) -> tuple[ActorCritic, Any]:
        """The model with all its adapters, policy and value trainable; the reward model's call."""
        folder, peft = reward_folder(self.settings), vlm.model
        score = None if folder is None else RewardScorer(vlm, folder, recipe.train.attention)
        if folder is None:
            peft.add_adapter(VALUE, lora_config(adapter_of(recipe), vlm))
        else:
            peft.load_adapter(str(folder), VALUE, is_trainable=True)
        model = ActorCritic(peft)
        model.temperature = self.settings.temperature
        if folder is not None:
            load_head(model, folder)
        peft.set_adapter(POLICY)
        for name, parameter in peft.named_parameters():
            parameter.requires_grad_(f".{POLICY}." in name or f".{VALUE}." in name)
        return model, score

    def _fits(self, recipe: Recipe, prompts: int) -> None:
        own, train = self.settings, recipe.train
        if own.rollout % train.batch_size:
            raise DataError(
                f"rollout: {own.rollout} prompts are no whole steps of train.batch_size "
                f"{train.batch_size}. Give a multiple"
            )
        if prompts < own.rollout:
            raise DataError(
                f"data.prompts: {prompts}, fewer than a rollout of {own.rollout}. Give more, or "
                "lower rollout"
            )
        each = own.rollout // train.batch_size * own.iterations
        if train.save_every % each:
            raise DataError(
                f"train.save_every {train.save_every} falls into the midst of a rollout, on which "
                f"{each} steps train: a resumed run would sample it anew. Give a multiple"
            )
        if train.gradient_checkpointing is True:
            raise DataError(
                "train.gradient_checkpointing: true, but policy and value take turns in one pass, "
                "which cannot be repeated. Set it to auto or false"
            )

    def _save(self, trainer: PpoTrainer, folder: Path) -> None:
        accelerator = trainer.accelerator
        state: Any = accelerator.get_state_dict(
            trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
        )
        model: Any = accelerator.unwrap_model(trainer.model)
        if accelerator.is_main_process:
            prefix = "backbone."
            own = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
            with store.folder_atomic(folder / "adapter") as aside:
                model.backbone.save_pretrained(
                    aside, state_dict=own, selected_adapters=[POLICY], safe_serialization=True
                )
        accelerator.wait_for_everyone()


METHOD = Ppo
