"""Length penalty, LLaVA-RLHF's (Sun et al., 2309.14525, and its released code).

    reward = -scale * (tokens / limit) * bonus                              at most 0

tokens: those of the answer, end of turn included; bonus: the multiplier of the record
(``Example.length_bonus``, times ``Completion.length_bonus``; 1 unless the data say otherwise).
There it is called a length bonus; it is a penalty. With scale 10 and limit 896 the longest answer
costs 10.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from mlalign.rewards._reward import Completion, RewardContext, Scored


class Settings(BaseModel):
    """What length costs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    scale: float = Field(default=10.0, ge=0)
    """Cost of an answer of ``limit`` tokens."""
    limit: int = Field(default=896, ge=1)
    """The most tokens that an answer may have."""


class LengthPenalty:
    """The reward."""

    Settings = Settings
    spans = False

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.settings = settings

    def __call__(self, completions: Sequence[Completion]) -> list[Scored]:
        """Counts: tokens."""
        per_token = self.settings.scale / self.settings.limit
        return [
            Scored(
                total=-per_token * len(c.token_ids) * c.example.length_bonus * c.length_bonus,
                counts={"tokens": float(len(c.token_ids))},
            )
            for c in completions
        ]


METHOD = LengthPenalty
