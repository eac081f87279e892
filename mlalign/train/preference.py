"""Train one arm: its pairs, one adapter (or the whole model), its probes, its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from mlalign import methods
from mlalign.data.collate import Collator, TokenisedPair, tokenise
from mlalign.data.reader import DataError, load_pairs
from mlalign.models._fingerprint import reference_key
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm, lora_config
from mlalign.recipe import Recipe, configure
from mlalign.runlog import RunLog
from mlalign.store import fingerprint, folder_atomic
from mlalign.train import checkpointing, checkpoints, launch
from mlalign.train._arguments import shared_arguments
from mlalign.train.heldout import HeldOut, image_of, split
from mlalign.train.references import References, Refresh
from mlalign.train.trainer import DPOConfig, PreferenceTrainer


def train_arm(recipe: Recipe, arm: str, run: Path) -> PreferenceTrainer:
    """Train ``arm`` of a recipe into ``run/<arm>``; resume from its last complete checkpoint.

    Pairs are read from ``recipe.data.pairs[arm]``, else from ``run/data/<arm>`` where the build
    left them. Writes ``run/<arm>/adapter`` in PEFT's format (or ``run/<arm>/model``). Every process
    of the launch calls this. Raises DataError, ModelError, LaunchError before the first step.
    """
    recipe = recipe.model_copy(update={"train": recipe.train_of(arm)})
    folder = run / arm
    source = recipe.pairs_of(arm, run)
    if not source.exists():
        raise DataError(f"{source}: no pairs for {arm!r}. Run `mlalign build` on the recipe first")
    launch.join(recipe.launch)
    arguments = training_arguments(recipe, folder)
    main = arguments.process_index == 0
    log = RunLog(run, enabled=main)
    # After the arguments, so that ZeRO-3 shards the weights while they load.
    vlm = load_vlm(recipe.model)
    objective = objective_of(recipe)
    views = getattr(objective, "views", ())
    pairs, skips = load_pairs(
        source,
        bad_records=recipe.data.bad_records,
        second_image=any(view.image == "record" for view in views),
    )
    edits = getattr(objective, "edits", False)
    if edits and not any(pair.segments for pair in pairs):
        raise DataError(
            f"{source}: no pair has segments, so {recipe.train.preferring().name} would weigh "
            "nothing and train plain DPO. Build the pairs with segments, or name another objective"
        )
    tokenised, cut = tokenise(vlm, pairs, recipe.train.max_length, quiet=not main, edits=edits)
    for skip in cut:
        skips[skip.reason] += 1
    if main and skips:
        log.event(arm, "pairs skipped", counts=dict(skips), examples=[s.detail for s in cut[:3]])
        print(f"{arm}: skipped {sum(skips.values())} pairs: {dict(skips)}", flush=True)
    training, heldout = split(tokenised, recipe.train.heldout, recipe.seed, image_of)
    _enough(training, recipe, source, skips)
    if recipe.train.heldout and not heldout:
        raise DataError(f"{source}: train.heldout {recipe.train.heldout:g} holds out no pair")
    if recipe.train.gradient_checkpointing == "auto":
        arguments.gradient_checkpointing, why = checkpointing.decide(recipe, vlm, tokenised)
        log.event(arm, "gradient checkpointing", on=arguments.gradient_checkpointing, why=why)
    trainer = _trainer(
        recipe,
        arm,
        vlm,
        [*training, *heldout],
        len(training),
        objective,
        arguments,
        log,
        fingerprint(source),
    )
    add_probes(recipe, arm, run, trainer, vlm, log)
    chooser = None
    if heldout:
        best = recipe.train.choose == "best"
        chooser = HeldOut(
            trainer,
            heldout,
            folder,
            every=recipe.train.save_every,
            save=(lambda target: save_result(trainer, vlm, target)) if best else None,
        )
        trainer.add_callback(chooser)
    last = checkpoints.last_complete(folder / "checkpoints")
    if last is not None:
        checkpoints.check(last, trainer.checkpoint_facts)
    # Without a checkpoint, all that an attempt logged before it was stopped.
    log.rewind(arm, -1 if last is None else int(last.name.rpartition("-")[2]))
    if last is not None:
        log.event(arm, "resumed", checkpoint=str(last))
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.references is not None:
        trainer.references.flush()
        counts = {"hits": trainer.references.hits, "misses": trainer.references.misses}
        log.event(arm, "reference cache, batches of rank 0", **counts)
    if chooser is not None and chooser.save is not None:
        log.event(arm, "weights chosen on held-out pairs", **chooser.best())
        chooser.take(folder)
    else:
        save_result(trainer, vlm, folder)
    return trainer


def training_arguments(recipe: Recipe, folder: Path) -> DPOConfig:
    """TRL's arguments from a recipe. No default of TRL's that changes a result is left unsaid."""
    return DPOConfig(
        **shared_arguments(recipe, folder),
        max_length=None,  # our collator cuts, and counts what it cuts
        disable_dropout=recipe.train.layout == "shared",
    )


def objective_of(recipe: Recipe) -> Any:
    """The recipe's objective with its settings. Raises RecipeError, UnknownMethod."""
    ref = recipe.train.preferring()
    method = methods.find("mlalign.objectives", ref.name)
    return method(configure(method, ref, "train.objective"))


def save_result(trainer: PreferenceTrainer, vlm: VLM, folder: Path) -> Path:
    """The adapter in PEFT's own format, or the whole model; written whole or not at all."""
    accelerator = trainer.accelerator
    state = accelerator.get_state_dict(
        trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    )
    model: Any = accelerator.unwrap_model(trainer.model)
    peft = hasattr(model, "get_base_model")
    target = folder / ("adapter" if peft else "model")
    if accelerator.is_main_process:
        with folder_atomic(target) as aside:
            # A reward model or a value may share the base, as adapters of their own.
            own = {"selected_adapters": ["default"]} if peft else {}
            model.save_pretrained(aside, state_dict=state, safe_serialization=True, **own)
            if not peft:
                vlm.processor.save_pretrained(aside)
    accelerator.wait_for_everyone()
    return target


def _trainer(
    recipe: Recipe,
    arm: str,
    vlm: VLM,
    tokenised: list[TokenisedPair],
    trained: int,
    objective: Any,
    arguments: DPOConfig,
    log: RunLog,
    data: str,
) -> PreferenceTrainer:
    train = recipe.train
    collator = Collator(
        vlm,
        tokenised,
        layout=train.layout,
        blank=train.blank_images,
        pack_to=train.pack_to,
        views=getattr(objective, "views", ()),
        seed=recipe.seed,
    )
    references = None
    if train.reference == "cached":
        key = reference_key(recipe.model, vlm, arm, blank=train.blank_images)
        references = References(
            train.reference_folder, key, collator.image_of, arguments.process_index
        )
    full = recipe.model.adapter == "none"
    rows = {"index": list(range(trained)), "images": [[] for _ in range(trained)]}
    trainer = PreferenceTrainer(
        model=vlm.model,
        vlm=vlm,
        ref_model=load_vlm(recipe.model).model if full else None,
        args=arguments,
        data_collator=collator,
        train_dataset=Dataset.from_dict(rows),
        processing_class=vlm.processor,
        peft_config=None
        if recipe.model.adapter == "none"
        else lora_config(recipe.model.adapter, vlm),
        objective=objective,
        attention=train.attention,
        references=references,
        log=log,
        arm=arm,
        checkpoint_facts={
            "data": data,
            "processes": launch.world_size(),
            "batch_size": recipe.train.batch_size,
            "micro_batch_size": recipe.train.micro_batch_size,
            "seed": recipe.seed,
        },
    )
    if references is not None:
        trainer.add_callback(Refresh(references))
    vlm.model = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.is_deepspeed_enabled:
        _keep_in_float32(vlm.model)
    if full:
        # The tower sees no preference: it stays as it was, as in the published full fine-tunings.
        vlm.family.frozen_towers(vlm.core)[0].requires_grad_(False)
    return trainer


def _keep_in_float32(model: torch.nn.Module) -> None:
    """Trained weights in float32: a step of 1e-6 is lost in bfloat16's rounding. DeepSpeed keeps
    float32 copies of its own; the forward runs under autocast."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def add_probes(recipe: Recipe, arm: str, run: Path, trainer: Any, vlm: VLM, log: RunLog) -> None:
    """The recipe's probes as a callback of a trainer of any algorithm; none where it names none."""
    if not recipe.probes.methods:
        return
    from mlalign.train.probe_callback import from_recipe

    callback = from_recipe(recipe, arm, run, vlm, log)
    reference = getattr(trainer, "ref_model", None)
    if reference is not None:
        callback.reference = trainer.accelerator.unwrap_model(reference)
    trainer.add_callback(callback)


def _enough(pairs: list[Any], recipe: Recipe, source: Path, skips: Any) -> None:
    if len(pairs) < recipe.train.batch_size:
        raise DataError(
            f"{source}: {len(pairs)} usable pairs, fewer than train.batch_size "
            f"{recipe.train.batch_size}; skipped: {dict(skips) or 'none'}. Lower the batch size or "
            "give more pairs"
        )
