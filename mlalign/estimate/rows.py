"""The rows of one image and its completions: how many tokens, and how many attended pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["shared", "padded", "separate"]


class PlanError(ValueError):
    """A recipe whose step cannot be estimated. The message names the key and the mend."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One image and prompt, and the completions that follow them."""

    prefix: int
    """Tokens that the completions share, image tokens included."""
    completions: tuple[int, ...]
    """Tokens of each."""
    layout: Layout = "shared"
    """shared: one row; padded: a row per completion, as long as the longest; separate: a row per
    completion, each of its own length."""
    tiles: int = 1
    """Images that the tower sees for this one."""

    def __post_init__(self) -> None:
        if self.prefix < 1 or not self.completions or min(self.completions) < 1:
            raise PlanError(f"rows need a prefix and completions of at least one token: {self}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        if self.layout == "shared":
            return (self.prefix + sum(self.completions),)
        longest = max(self.completions)
        own = self.completions if self.layout == "separate" else [longest] * len(self.completions)
        return tuple(self.prefix + each for each in own)

    @property
    def tokens(self) -> int:
        """Tokens that pass through the decoder."""
        return sum(self.lengths)

    @property
    def scored(self) -> int:
        """Positions at which the head runs: one per token of a completion."""
        return sum(self.completions)

    @property
    def attended(self) -> int:
        """(query, key) pairs under the mask. Shared: P (P + 1) / 2 once, and for each completion
        L P + L (L + 1) / 2; else S (S + 1) / 2 for each row."""
        return self.attended_in(None)

    def attended_in(self, window: int | None, block: int = 0) -> int:
        """``attended`` where a token sees at most ``window`` tokens, itself included, and the
        first of ``block`` tokens of each prefix see the later ones as well."""
        both_ways = block * (block - 1) // 2
        prefix = _causal(self.prefix, window)
        if self.layout == "shared":
            after = [_causal(self.prefix + n, window) - prefix for n in self.completions]
            return prefix + sum(after) + both_ways
        return sum(_causal(length, window) + both_ways for length in self.lengths)


def _causal(length: int, window: int | None) -> int:
    """Pairs of a row in which each token sees itself and what stands before it in the window."""
    within = length if window is None else min(length, window)
    return within * (within + 1) // 2 + (length - within) * within
