"""Train the microworld's base model: ``python -m mlalign.microworld.train_base RECIPE``.

First the tower and the projector learn what stands in each cell (``warmup``), then the whole model
is fine-tuned on dialogues by the framework's own SFT stage. The folder is written aside and put in
place whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field
from transformers import LlavaForConditionalGeneration, TrainerCallback

from mlalign.microworld import model as stock
from mlalign.microworld import world
from mlalign.microworld.warmup import warm_up
from mlalign.records import Dialogue


class WarmUp(BaseModel):
    """The first stage; ``steps: 0`` leaves it out."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(default=500, ge=0)
    batch: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)


class BaseRecipe(BaseModel):
    """recipes/microworld/base.yaml."""

    model_config = ConfigDict(extra="forbid")

    seed: int = 0
    """Draws the first weights and the order; the world itself is always that of seed 0."""
    scenes: int = Field(default=100_000, ge=1)
    """Scenes of the train split; each is drawn when its turn comes."""
    warm_up: WarmUp = WarmUp()
    sft: dict[str, Any]
    """Settings of mlalign.train.sft."""


class SceneDialogues(Sequence[Dialogue]):
    """The dialogues of scenes ``first`` to ``first + count - 1`` of a split, made when asked."""

    def __init__(self, split: str, count: int, first: int = 0) -> None:
        self.split, self.total, self.first = split, count, first

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.total:
            raise IndexError(index)
        return world.dialogue(self.split, self.first + index)


class _SaveEvery(TrainerCallback):
    """Write the folder every ``steps`` steps, so that a long training can be looked at."""

    def __init__(self, steps: int, folder: Path, processor: Any) -> None:
        self.steps, self.folder, self.processor = steps, folder, processor

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.steps and state.global_step % self.steps == 0:
            save(kwargs["model"], self.processor, self.folder)


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write model and processor aside, then put them in the place of ``folder``."""
    aside = folder.with_name(f"{folder.name}.new{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    for file in aside.iterdir():
        file.chmod(0o644)  # safetensors files come readable by their owner only
    old = folder.with_name(f"{folder.name}.old{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def train_base(
    recipe: BaseRecipe,
    folder: Path,
    run_dir: Path,
    save_every: int = 0,
    start: Path | None = None,
) -> LlavaForConditionalGeneration:
    """Train from nothing, or SFT alone from the weights in ``start``, and write ``folder``.

    Returns the trained model, in float32.
    """
    from mlalign.train.sft import SftSettings, train_sft

    settings = SftSettings.model_validate({"seed": recipe.seed} | recipe.sft)
    processor = stock.new_processor()
    started = time.monotonic()
    if start is None:
        model = stock.new_model(recipe.seed)
        if recipe.warm_up.steps:
            words = processor.tokenizer
            warm_up(model, words, seed=recipe.seed, log=_log, **recipe.warm_up.model_dump())
    else:
        model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    dialogues = SceneDialogues("train", recipe.scenes)
    save_now_and_then = _SaveEvery(save_every, folder, processor)
    model = train_sft(model, processor, dialogues, settings, run_dir, [save_now_and_then])
    save(model, processor, folder)
    _log(f"{folder} written after {time.monotonic() - started:.0f} s")
    return model


def load_recipe(path: str | Path) -> BaseRecipe:
    """The recipe. Raises OSError, yaml.YAMLError or pydantic.ValidationError, naming the key."""
    return BaseRecipe.model_validate(yaml.safe_load(Path(path).read_text()) or {})


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="mlalign.microworld.train_base", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, default=stock.base_folder(), help="folder to write")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/microworld-base"))
    parser.add_argument("--save-every", type=int, default=0, help="also write OUT every N steps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--from", dest="start", type=Path, help="folder to go on from: SFT alone")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    train_base(load_recipe(args.recipe), args.out, args.run_dir, args.save_every, args.start)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
