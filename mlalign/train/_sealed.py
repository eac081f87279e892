"""What every trainer here shares: its log lines, and checkpoints that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mlalign.runlog import RunLog
from mlalign.train import checkpoints

PROGRESS = "MLALIGN_PROGRESS"
"""Environment variable: print progress as lines that the command line draws as a bar."""


TRAINED = "trained.safetensors"
"""Weights that train, in a checkpoint that holds nothing else of the model."""


class Sealed:
    """Mixed into a transformers ``Trainer``, before it. Sets what ``__init__`` of the trainer does
    not: ``run_log``, ``arm``, ``checkpoint_facts``, ``keep_checkpoints``."""

    run_log: RunLog
    arm: str
    checkpoint_facts: dict[str, Any]
    keep_checkpoints: int = 2
    shown: tuple[tuple[str, str], ...] = (("loss", "loss"),)
    """(key of the logs, what the progress bar calls it); the first decides whether one is drawn."""

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to the trackers, and to the run folder."""
        super().log(logs, start_time)  # type: ignore[misc]
        self.run_log.metrics(self.arm, self.state.global_step, logs)
        if self.run_log.enabled and os.environ.get(PROGRESS) and self.shown[0][0] in logs:
            last = ", ".join(f"{n} {logs[k]:.3f}" for k, n in self.shown if k in logs)
            line = {
                "description": self.arm,
                "total": self.state.max_steps,
                "completed": self.state.global_step,
                "last": last,
            }
            print(f"mlalign-progress {json.dumps(line)}", flush=True)

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        """Written aside, sealed with a manifest, renamed; older ones are rotated away."""
        self.before_checkpoint()
        target = Path(str(self.args.output_dir))
        aside = target / "writing"
        self.args.output_dir = str(aside)
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.output_dir = str(target)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            name = f"checkpoint-{self.state.global_step}"
            checkpoints.seal(aside / name, target / name, self.checkpoint_facts)
            checkpoints.rotate(target, self.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def before_checkpoint(self) -> None:
        """What has to be on the disk before a checkpoint counts."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card per checkpoint: the run folder's manifest and report say more."""


class SavesTrained:
    """Mixed into a ``Trainer``: checkpoints hold only what trains; the frozen weights are those of
    the recipe's model."""

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        state = state_dict or model.state_dict()
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: state[n].contiguous() for n in sorted(names)}, folder / TRAINED)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / TRAINED)
        into: Any = model or self.model
        missing, unexpected = into.load_state_dict(state, strict=False)
        trained = {n for n, p in into.named_parameters() if p.requires_grad}
        if unexpected or trained & set(missing):
            names = sorted({*unexpected, *(trained & set(missing))})
            raise ValueError(f"{resume_from_checkpoint}: does not fit the model at {names[0]}")
