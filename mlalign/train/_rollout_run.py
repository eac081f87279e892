"""One run of a group algorithm, from a recipe to the saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model

from mlalign import store
from mlalign.data.reader import DataError
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm, lora_config
from mlalign.recipe import Recipe
from mlalign.records import Example
from mlalign.runlog import RunLog
from mlalign.sections import LoraSection
from mlalign.train import checkpoints, launch
from mlalign.train import watching as watch
from mlalign.train._arguments import shared_arguments
from mlalign.train._rewarding import build as build_rewards
from mlalign.train._rewarding import reward_folder
from mlalign.train.preference import add_probes, save_result
from mlalign.train.rollouts import Roller


def run_groups(
    recipe: Recipe,
    arm: str,
    run: Path,
    settings: Any,
    *,
    trainer: Any,
    config: Any,
    keys: dict[str, Any],
) -> Any:
    """Train ``arm`` on the prompts of ``run/data/<arm>``; resume from its last checkpoint.

    ``settings``: those of the algorithm (Sampling, RewardSettings, WatchSettings, credit, beta,
    iterations). ``trainer``, ``config``: the trainer's class and TRL's configuration; ``keys``:
    the latter's keywords. Raises DataError, RecipeError, LaunchError before the first step.
    """
    folder = run / arm
    examples = examples_of(recipe, run / "data" / arm)
    adapter = adapter_of(recipe)
    _fits(recipe, settings)
    launch.join(recipe.launch)
    arguments = config(
        **shared_arguments(recipe, folder, per=settings.group),
        num_generations=settings.group,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        beta=0.0,  # told to the trainer later: see there
        disable_dropout=True,
        **keys,
    )
    log = RunLog(run, enabled=arguments.process_index == 0)
    vlm = load_vlm(recipe.model)
    torch.manual_seed(recipe.seed)  # the adapter's first weights
    vlm.model = get_peft_model(vlm.model, lora_config(adapter, vlm))
    score = _reward_model(settings, vlm, recipe)
    roller = Roller(vlm, build_rewards(settings, recipe, vlm, score), settings, recipe.seed)
    made = trainer(
        model=vlm.model,
        args=arguments,
        train_dataset=prompt_rows(len(examples)),
        processing_class=vlm.processor,
        vlm=vlm,
        roller=roller,
        credit=settings.credit,
        examples=examples,
        beta=settings.beta,
        attention=recipe.train.attention,
        log=log,
        arm=arm,
        checkpoint_facts={
            "data": store.fingerprint(run / "data" / arm),
            "processes": launch.world_size(),
            "batch_size": recipe.train.batch_size,
            "micro_batch_size": recipe.train.micro_batch_size,
            "group": settings.group,
            "seed": recipe.seed,
        },
    )
    vlm.model = made.accelerator.unwrap_model(made.model)
    if settings.watch_every:
        made.add_callback(watch.Watch(settings, vlm, watch.heldout(run), recipe, log, arm))
    add_probes(recipe, arm, run, made, vlm, log)
    resume(made, folder, log, arm)
    save_result(made, vlm, folder)
    return made


def examples_of(recipe: Recipe, folder: Path) -> list[Example]:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no prompts. Give data.source and data.prompts, and run `mlalign build`"
        )
    examples = store.read_examples(folder)
    if len(examples) < recipe.train.batch_size:
        raise DataError(
            f"{folder}: {len(examples)} prompts, fewer than train.batch_size "
            f"{recipe.train.batch_size}. Lower it, or raise data.prompts"
        )
    return examples


def resume(trainer: Any, folder: Path, log: RunLog, arm: str) -> None:
    """Train, from the last complete checkpoint where there is one."""
    last = checkpoints.last_complete(folder / "checkpoints")
    if last is not None:
        checkpoints.check(last, trainer.checkpoint_facts)
    # A run that was killed before its first checkpoint begins again, and its log with it.
    log.rewind(arm, -1 if last is None else int(last.name.rpartition("-")[2]))
    if last is not None:
        log.event(arm, "resumed", checkpoint=str(last))
    trainer.train(resume_from_checkpoint=str(last) if last else None)


def adapter_of(recipe: Recipe) -> LoraSection:
    """The adapter. Raises DataError for full fine-tuning, which leaves no reference behind."""
    if recipe.model.adapter == "none":
        raise DataError(
            f"model.adapter: none, but {recipe.train.algorithm.name} keeps its reference as the "
            "model without its adapter. Give model.adapter: {rank: 64, alpha: 128}"
        )
    return recipe.model.adapter


def _fits(recipe: Recipe, settings: Any) -> None:
    """What would train on something else than was sampled, or only later fail."""
    every = recipe.train.save_every
    if every % settings.iterations:
        raise DataError(
            f"train.save_every {every} falls into the midst of a rollout, on which "
            f"{settings.iterations} steps train: a resumed run would sample it anew. Give a "
            "multiple"
        )


def prompt_rows(count: int) -> Dataset:
    """Rows for TRL's sampler; the examples themselves are looked up by index."""
    prompt = [{"role": "user", "content": ""}]
    return Dataset.from_dict({"prompt": [prompt] * count, "index": list(range(count))})


def _reward_model(settings: Any, vlm: VLM, recipe: Recipe) -> Any:
    folder = reward_folder(settings)
    if folder is None:
        return None
    from mlalign.train.reward_scorer import RewardScorer

    return RewardScorer(vlm, folder, recipe.train.attention)
