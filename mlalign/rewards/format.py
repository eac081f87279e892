"""Format: does the answer, as a whole, look as it should?

    reward = ``right`` where the regular expression matches the whole answer, else ``wrong``

The dot matches line ends too. Examples: ``(yes|no)\\.?`` for closed questions, ``.*[.!?]`` for
whole sentences, ``(?!.*\\?\\s*\\?).*`` against the runs of question marks that LLaVA-RLHF cuts off.
An empty answer is matched like any other. It says nothing about what the answer means.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, field_validator

from mlalign.rewards._reward import Completion, RewardContext, Scored


class Settings(BaseModel):
    """What is looked for, and what it is worth."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    pattern: str
    """Regular expression (Python's) of the whole answer."""
    ignore_case: bool = False
    right: float = 0.0
    """Reward of an answer that matches."""
    wrong: float = -1.0
    """Reward of one that does not."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        return value


class Format:
    """The reward."""

    Settings = Settings
    spans = False

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.settings = settings
        flags = re.DOTALL | (re.IGNORECASE if settings.ignore_case else 0)
        self.pattern = re.compile(settings.pattern, flags)

    def __call__(self, completions: Sequence[Completion]) -> list[Scored]:
        """Counts: wrong."""
        wrong = [self.pattern.fullmatch(c.text) is None for c in completions]
        return [
            Scored(
                total=self.settings.wrong if bad else self.settings.right,
                counts={"wrong": float(bad)},
            )
            for bad in wrong
        ]


METHOD = Format
