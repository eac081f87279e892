"""Random trajectories with spans, as tensors and as plain lists."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlalign.credit.spans import TokenSpans, lay_spans

Span = tuple[int, int, float, str]


@dataclass
class Rollout:
    """One completion: a token is three characters wide, the last one the end of turn."""

    length: int
    spans: list[Span]
    level: float
    policy: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def offsets(self) -> list[tuple[int, int]]:
        spelt = [(3 * t, 3 * t + 3) for t in range(self.length - 1)]
        return [*spelt, (3 * self.length - 3, 3 * self.length - 3)]

    @property
    def total(self) -> float:
        return self.level + sum(score for _, _, score, _ in self.spans)

    def tokens(self, span: Span) -> list[int]:
        """By hand: the tokens of whole-token spans, and the end of turn where the text's is in."""
        first, last = span[0] // 3, span[1] // 3
        ends_text = span[1] == 3 * (self.length - 1)
        return [*range(first, last), *([self.length - 1] if ends_text else [])]


def rollouts(count: int, seed: int = 0, terms: int = 2) -> list[Rollout]:
    """Spans of whole tokens; within a term apart, of different terms as they fall."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        length = rng.randint(2, 14)
        spans: list[Span] = []
        for term in range(terms):
            at = 0
            while at < length - 1:
                size = rng.randint(1, 3)
                end = min(at + size, length - 1)
                if rng.random() < 0.6:
                    spans.append((3 * at, 3 * end, rng.gauss(0, 1), f"term{term}"))
                at = end
        drawn = [[rng.gauss(-1, 0.5) for _ in range(length)] for _ in range(3)]
        made.append(Rollout(length, spans, rng.gauss(0, 2), *drawn))
    return made


def laid(made: list[Rollout], pad: int = 0) -> tuple[TokenSpans, Tensor]:
    """Spans on tokens, and the mask of real ones, ``pad`` wider than need be."""
    width = max(r.length for r in made) + pad
    mask = torch.tensor([[t < r.length for t in range(width)] for r in made])
    return lay_spans([r.spans for r in made], [r.offsets for r in made], width), mask


def column(made: list[Rollout], name: str, width: int, junk: float = 7.0) -> Tensor:
    """A list of each rollout as float64 rows, with junk under the padding."""
    rows = [getattr(r, name) for r in made]
    return torch.tensor([[*r, *[junk] * (width - len(r))] for r in rows], dtype=torch.float64)
