"""No-stop penalty, LLaVA-RLHF's (Sun et al., 2309.14525, and its released code).

    reward = -penalty where the answer has no end of turn, else 0

An answer that runs into the most tokens allowed is cut, and what it would have said is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from mlalign.rewards._reward import Completion, RewardContext, Scored


class Settings(BaseModel):
    """What not stopping costs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    penalty: float = Field(default=8.0, ge=0)
    """Taken off the reward of an answer that never ends."""


class NoStop:
    """The reward."""

    Settings = Settings
    spans = False

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.settings = settings

    def __call__(self, completions: Sequence[Completion]) -> list[Scored]:
        """Counts: cut, 1 where the answer does not end."""
        return [
            Scored(
                total=0.0 if c.stopped else -self.settings.penalty,
                counts={"cut": float(not c.stopped)},
            )
            for c in completions
        ]


METHOD = NoStop
