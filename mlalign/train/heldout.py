"""Held-out pairs: a part of the training pairs that no step sees, to choose a checkpoint on.

A checkpoint chosen on a benchmark makes that benchmark's figure an optimum of a sample. Here the
loss of held-out pairs decides (``train.choose: best``), and benchmarks stay unseen. Pairs are held
out by image: no image stands on both sides.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback

from mlalign.data.collate import TokenisedPair
from mlalign.store import write_json_atomic

T = TypeVar("T")


def split(
    items: Sequence[T], share: float, seed: int, image: Callable[[T], str]
) -> tuple[list[T], list[T]]:
    """(what to train on, what is held out): about ``share`` of the images, drawn by their digests.

    ``image``: digest of an item's image. The draw depends on it and the seed alone: the same image
    is held out in every arm and round.
    """
    held: list[T] = []
    kept: list[T] = []
    for item in items:
        digest = hashlib.sha256(f"{seed}/{image(item)}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "big") / 2**64
        (held if drawn < share else kept).append(item)
    return kept, held


def image_of(pair: TokenisedPair) -> str:
    """Digest of a pair's image."""
    return pair.pair.image_sha256 or pair.pair.image.sha256()


class HeldOut(TrainerCallback):
    """Measures held-out pairs every N steps and at the end; keeps the best weights if asked.

    Every rank measures all of them: under ZeRO-3 a forward pass needs all ranks.
    """

    def __init__(
        self,
        trainer: Any,
        pairs: Sequence[TokenisedPair],
        folder: Path,
        *,
        every: int,
        save: Callable[[Path], Path] | None = None,
    ) -> None:
        """``every``: steps between passes; 0: only after the last. ``save``: writes the weights
        into a folder, called by all ranks; None: nothing is kept."""
        self.trainer = trainer
        self.pairs = list(pairs)
        self.folder = folder / "best"
        self.every = every
        self.save = save
        self.last_step = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A pass where the step is a multiple of ``every``."""
        if self.every and state.global_step % self.every == 0:
            self.run(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last pass, unless this step had one."""
        if state.global_step != self.last_step:
            self.run(state.global_step)

    def run(self, step: int) -> dict[str, float]:
        """Mean loss and accuracy over the held-out pairs; logged as heldout/*."""
        self.last_step = step
        trainer = self.trainer
        losses, right = [], []
        size = max(1, int(trainer.args.per_device_train_batch_size))
        was_training = trainer.model.training
        trainer.model.eval()
        with torch.no_grad():
            for start in range(0, len(self.pairs), size):
                batch = trainer.data_collator.collate(self.pairs[start : start + size])
                out = trainer.outputs(trainer.model_wrapped, batch)[-1]
                losses += out.per_pair_N.tolist()
                right += (out.margins_N > 0).tolist()
        trainer.model.train(was_training)
        found = {
            "heldout/loss": sum(losses) / len(losses),
            "heldout/accuracy": sum(right) / len(right),
            "heldout/pairs": float(len(losses)),
        }
        trainer.run_log.metrics(trainer.arm, step, found)
        if self.save is not None and found["heldout/loss"] < self.best()["heldout/loss"]:
            self.save(self.folder)
            if trainer.accelerator.is_main_process:
                write_json_atomic(self.folder / "heldout.json", {"step": step, **found})
            trainer.accelerator.wait_for_everyone()
        return found

    def best(self) -> dict[str, float]:
        """What the kept weights gave, and their step; an infinite loss before the first."""
        file = self.folder / "heldout.json"
        if not file.is_file():
            return {"heldout/loss": float("inf")}
        return json.loads(file.read_text(encoding="utf-8"))

    def take(self, target: Path) -> Path:
        """Move the kept weights beside ``heldout.json``'s folder as the arm's result."""
        (kept,) = (each for each in self.folder.iterdir() if each.is_dir())
        result = target / kept.name
        if self.trainer.accelerator.is_main_process:
            shutil.rmtree(result, ignore_errors=True)
            kept.rename(result)
        self.trainer.accelerator.wait_for_everyone()
        return result
