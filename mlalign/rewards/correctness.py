"""Correctness of answers to closed questions, by LLaVA-RLHF's exact rule (Sun et al., 2309.14525).

    reward = scale * s
        gold an option letter   s = 1 where the answer opens with the letter and a full stop, or
                                says "correct option is" and both (its A-OKVQA answers reason
                                first), else 0
        gold "No"               s = +0.5 where the answer opens with No, -0.5 where with Yes
        gold "Yes"              s = 0, whatever is said

As released, with scale 2.0: +2 for the option, +1 and -1 for the denial. A true "Yes" earns
nothing, so the rule alone teaches to deny (the published models say yes less often); ``yes: 0.5``
scores it likewise. Yes and No are whole words here, in any case; there "None" and "Not" deny, too,
and "no" does not. The gold answer is ``facts.answer``; anything else (a caption, a word) is no
closed question: 0, counted as ``open``. An answer to a yes/no question that opens with neither gets
0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from mlalign.rewards._reward import Completion, RewardContext, Scored

_OPTION = re.compile(r"([A-Z])(?:\.(?:\s|$)|$)")
"""A gold answer that is an option: "B", "B." or "B. a dog"."""
_STATED = "correct option is "
_OPENING = re.compile(r"(yes|no)\b", re.IGNORECASE)


class Settings(BaseModel):
    """What being right is worth."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    scale: float = Field(default=2.0, ge=0)
    option: float = 1.0
    """s of the right option."""
    no: float = 0.5
    """s of a right "No"; a wrong "Yes" gets minus it."""
    yes: float = 0.0
    """s of a right "Yes"; a wrong "No" gets minus it."""


class Correctness:
    """The reward."""

    Settings = Settings
    spans = False

    def __init__(self, settings: Settings, context: RewardContext) -> None:
        self.settings = settings

    def __call__(self, completions: Sequence[Completion]) -> list[Scored]:
        """Counts: open, 1 where the gold answer is none of a closed question."""
        scored = []
        for completion in completions:
            s = self.share(completion.example.facts.answer, completion.text)
            total = 0.0 if s is None else self.settings.scale * s
            scored.append(Scored(total=total, counts={"open": float(s is None)}))
        return scored

    def share(self, gold: str | None, text: str) -> float | None:
        """s of an answer; None where the question is open."""
        gold = (gold or "").strip()
        option = _OPTION.match(gold)
        if option:
            letter = f"{option[1]}."
            picked = text.startswith(letter) or f"{_STATED}{letter}" in text
            return self.settings.option if picked else 0.0
        if gold.rstrip(".").lower() not in ("yes", "no"):
            return None
        right = gold.rstrip(".").lower()
        said = _OPENING.match(text)
        if said is None:
            return 0.0
        worth = self.settings.yes if right == "yes" else self.settings.no
        return worth if said[1].lower() == right else -worth


METHOD = Correctness
