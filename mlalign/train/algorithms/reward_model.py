"""A reward model on preference pairs: a scalar head and a LoRA adapter on a shared frozen base.

LLaVA-RLHF (2309.14525): one score at the last token, ``facts: true`` shows it what is known of the
image, centering 1e-3. ``form: sentence`` scores every sentence instead, as ViGoR (2402.06118) does;
its weights and rates are not published, so these are this project's. The pairs are those of DPO.
``pair_weight: 0`` learns from ratings of sentences alone.

Written: ``run/<arm>/adapter`` (PEFT's format, the head beside it, and ``reward_model.json``) and
``heldout.json`` with accuracy, calibration and margin on ``heldout`` of the images, of pairs where
they are learned from, and of rated sentences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from pydantic import Field, model_validator
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import TrainingArguments

from mlalign.data.reader import DataError, load_pairs
from mlalign.models._scalar import ScalarModel, save_head
from mlalign.models.loading import load_vlm, lora_config
from mlalign.recipe import Recipe
from mlalign.records import Skip
from mlalign.runlog import RunLog
from mlalign.store import fingerprint, folder_atomic, write_json_atomic
from mlalign.train import launch
from mlalign.train._arguments import shared_arguments
from mlalign.train._rollout_run import resume
from mlalign.train._scored import Asking, ScoreCollator, ScoredRow, pair_rows
from mlalign.train.heldout import split
from mlalign.train.reward_trainer import LossSettings, RewardTrainer

SETTINGS = "reward_model.json"
BINS = 10
"""Of the calibration error."""
UNRATED = "no sentence of it is rated"


class Settings(Asking, LossSettings):
    """What is shown, where it is scored, and the loss."""

    heldout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the images whose pairs no step sees and the final figures are of."""

    @model_validator(mode="after")
    def _learns(self) -> Settings:
        if not self.pair_weight and not (self.form == "sentence" and self.sentence_weight):
            raise ValueError("pair_weight: 0 leaves nothing to learn from but form: sentence")
        return self


class RewardModel:
    """The algorithm."""

    Settings = Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def train(self, recipe: Recipe, arm: str, run: Path) -> RewardTrainer:
        """Train the arm on its pairs. Raises DataError, ModelError, LaunchError before a step."""
        recipe = recipe.model_copy(update={"train": recipe.train_of(arm)})
        if recipe.model.adapter == "none":
            raise DataError(
                "model.adapter: none, but a reward model is an adapter and a head on a frozen base "
                "that it shares with the policy. Give model.adapter: {rank: 64, alpha: 16}"
            )
        source = recipe.pairs_of(arm, run)
        if not source.exists():
            raise DataError(f"{source}: no pairs for {arm!r}. Run `mlalign build` first")
        launch.join(recipe.launch)
        folder = run / arm
        arguments = TrainingArguments(**shared_arguments(recipe, folder))
        log = RunLog(run, enabled=arguments.process_index == 0)
        vlm = load_vlm(recipe.model)
        pairs, skips = load_pairs(source, bad_records=recipe.data.bad_records)
        rows, cut = pair_rows(vlm, pairs, self.settings, recipe.train.max_length)
        rows, unrated = self._learned_from(rows)
        for skip in cut + unrated:
            skips[skip.reason] += 1
        if skips:
            log.event(arm, "pairs skipped", counts=dict(skips))
            print(f"{arm}: skipped {sum(skips.values())} pairs: {dict(skips)}", flush=True)
        training, heldout = split(
            rows,
            self.settings.heldout,
            recipe.seed,
            lambda row: row.image_sha256 or row.image.sha256(),
        )
        if len(training) < recipe.train.batch_size:
            raise DataError(
                f"{source}: {len(training)} pairs to train on, fewer than train.batch_size "
                f"{recipe.train.batch_size}. Lower it, or give more pairs"
            )
        torch.manual_seed(recipe.seed)
        backbone = get_peft_model(vlm.model, lora_config(recipe.model.adapter, vlm))
        trainer = self._trainer(recipe, arm, vlm, backbone, training, arguments, log, source)
        resume(trainer, folder, log, arm)
        if heldout:
            judged = trainer.judge(heldout, recipe.train.micro_batch_size)
            found = figures(*judged, compared=self.settings.pair_weight > 0)
            log.metrics(arm, trainer.state.global_step, found)
            if arguments.process_index == 0:
                write_json_atomic(folder / "heldout.json", found)
                told = [f"{key.removeprefix('heldout/')} {found[key]:.3f}" for key in found]
                print(f"{arm}, held out: {', '.join(told)}", flush=True)
        self._save(trainer, folder)
        return trainer

    def _learned_from(self, rows: list[ScoredRow]) -> tuple[list[ScoredRow], list[Skip]]:
        """The rows that the loss says something of, and the others."""
        if self.settings.pair_weight:
            return rows, []
        return (
            [row for row in rows if row.labels is not None],
            [Skip(id=row.id, reason=UNRATED) for row in rows if row.labels is None],
        )

    def _trainer(
        self,
        recipe: Recipe,
        arm: str,
        vlm: Any,
        backbone: Any,
        rows: list[ScoredRow],
        arguments: TrainingArguments,
        log: RunLog,
        source: Path,
    ) -> RewardTrainer:
        trainer = RewardTrainer(
            model=ScalarModel(backbone),
            vlm=vlm,
            settings=self.settings,
            attention=recipe.train.attention,
            args=arguments,
            data_collator=ScoreCollator(vlm, rows),
            train_dataset=Dataset.from_dict({"index": list(range(len(rows)))}),
            log=log,
            arm=arm,
            checkpoint_facts={
                "data": fingerprint(source),
                "processes": launch.world_size(),
                "batch_size": recipe.train.batch_size,
                "micro_batch_size": recipe.train.micro_batch_size,
                "seed": recipe.seed,
            },
        )
        vlm.model = backbone
        return trainer

    def _save(self, trainer: RewardTrainer, folder: Path) -> None:
        accelerator = trainer.accelerator
        state: Any = accelerator.get_state_dict(
            trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
        )
        model: Any = accelerator.unwrap_model(trainer.model)
        if accelerator.is_main_process:
            prefix = "backbone."
            own = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
            with folder_atomic(folder / "adapter") as aside:
                model.backbone.save_pretrained(aside, state_dict=own, safe_serialization=True)
                save_head(state, aside)
                write_json_atomic(aside / SETTINGS, self.settings.model_dump(mode="json"))
        accelerator.wait_for_everyone()


def figures(score_N2: Tensor, part_2M: Tensor, *, compared: bool = True) -> dict[str, float]:
    """What held-out pairs say of a reward model.

    ``score_N2``: scores of chosen and rejected. ``part_2M``: score and label of each rated part.
    ``compared``: it learned which answer is better, so that this is asked of it.
    Accuracy counts a tie as half; the calibration error is the mean over pairs of the difference
    between sigmoid(|margin|) and how often the higher score was right, in BINS bins of equal width
    of that probability (0.5 to 1). Of sentences: how many are told apart at a score of 0, how many
    of them are right (what telling all of them right would give), and the area under the ROC curve
    where there are both.
    """
    found = {"heldout/pairs": float(len(score_N2))}
    if compared:
        found |= _compared((score_N2[:, 0] - score_N2[:, 1]).double())
    if part_2M.shape[1]:
        right_M = (part_2M[0] > 0).float() == part_2M[1]
        found["heldout/sentences"] = float(len(right_M))
        found["heldout/sentence_accuracy"] = float(right_M.float().mean())
        found["heldout/sentence_right"] = float(part_2M[1].mean())
        if 0 < found["heldout/sentence_right"] < 1:
            scored, label = part_2M.double().numpy()
            found["heldout/sentence_auc"] = float(roc_auc_score(label, scored))
    return found


def _compared(margin_N: Tensor) -> dict[str, float]:
    right_N = (margin_N > 0).double() + (margin_N == 0).double() / 2
    sure_N = torch.sigmoid(margin_N.abs())
    bin_N = ((sure_N - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    error = sum(
        float((sure_N[bin_N == b] - right_N[bin_N == b]).mean().abs() * (bin_N == b).sum())
        for b in bin_N.unique()
    )
    return {
        "heldout/accuracy": float(right_N.mean()),
        "heldout/margin": float(margin_N.mean()),
        "heldout/calibration_error": error / len(margin_N),
        "heldout/loss": float(-torch.nn.functional.logsigmoid(margin_N).mean()),
    }


METHOD = RewardModel
