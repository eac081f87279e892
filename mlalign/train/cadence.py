"""Steps between probe passes: given, or made once out of a share of the training time.

    N = ceil(pass (1 - share) / (share step))      pass, step: seconds of one

which leaves passes at most ``share`` of the time that steps and passes take together. The first
step warms up, the next ``TIMED`` are timed from end to end (loading of data included), and the pass
that follows them is timed: not the one before the first step, which reads the base model as well
and runs the rare tier. N is the main process's; it never changes, and a resumed run takes it from
the manifest.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP = 1
"""Steps before the timed ones."""
TIMED = 3
"""Steps that are timed."""


@dataclass(kw_only=True)
class Cadence:
    """When passes run; ``share`` until ``every`` is known."""

    every: int | None = None
    """Steps between passes, 0: none between the first and the last; None: not known yet."""
    share: float | None = None
    timed_pass: int | None = None
    """Step of the pass that was timed, which stands beside the multiples of ``every``."""
    step_seconds: float | None = None
    pass_seconds: float | None = None
    _steps: int = 0
    _start: float = 0.0

    def tick(self) -> None:
        """A step ended; one of the first where ``share`` is to be made into steps."""
        if self.every is not None:
            return
        self._steps += 1
        if self._steps == WARM_UP:
            self._start = now()
        elif self._steps == WARM_UP + TIMED:
            self.step_seconds = (now() - self._start) / TIMED

    def times_a_pass(self) -> bool:
        """Whether the pass of this step is to be timed."""
        return self.every is None and self._steps >= WARM_UP + TIMED

    def is_due(self, step: int) -> bool:
        """Whether a pass runs at ``step``."""
        if self.every is None:
            return self.times_a_pass()
        return step == self.timed_pass or bool(self.every and step % self.every == 0)

    def decide(self, step: int, seconds: float) -> None:
        """Fix ``every`` by the pass at ``step``, which took ``seconds``; alike on every rank."""
        assert self.share is not None and self.step_seconds is not None
        every = steps_between(seconds, self.step_seconds, self.share)
        found = from_main((every, self.step_seconds, seconds))
        self.every, self.step_seconds, self.pass_seconds = found
        self.timed_pass = step

    def facts(self) -> dict[str, Any]:
        """What the manifest keeps."""
        kept = ("every", "share", "timed_pass", "step_seconds", "pass_seconds")
        return {name: getattr(self, name) for name in kept if getattr(self, name) is not None}

    def resume(self, facts: dict[str, Any], arm: str) -> None:
        """Take the cadence that the manifest keeps of a run that goes on.

        Raises ValueError where it began with another one.
        """
        for name in ("share", "every"):
            mine, began = getattr(self, name), facts.get(name)
            decided = name == "every" and self.share is not None
            if facts and mine != began and not decided:
                raise ValueError(
                    f"probes.{name} is {mine}, but {arm} began with {began}: the cadence of a run "
                    "never changes. Restore it to go on, or train anew under another name"
                )
        for name in ("every", "timed_pass", "step_seconds", "pass_seconds"):
            if name in facts:
                setattr(self, name, facts[name])


def steps_between(pass_seconds: float, step_seconds: float, share: float) -> int:
    """The fewest steps between passes that leave them at most ``share`` of the time."""
    return max(1, math.ceil(pass_seconds * (1 - share) / (share * step_seconds)))


def now() -> float:
    """Seconds of a clock, after what was started on the GPU has ended."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def from_main(value: Any) -> Any:
    """``value`` of the main process, on every process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
