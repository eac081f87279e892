"""Completions for the rewards' tests: a word is a token, and so is every other mark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mlalign.objects import vocabulary
from mlalign.records import Example, Facts, ImageRef, ObjectFact
from mlalign.rewards._reward import Completion, RewardContext

COCO = vocabulary("coco")


def example(id: str = "e", **facts: Any) -> Example:
    """A photograph of a dog and a person, unless the facts say otherwise."""
    facts = facts or {"objects": (ObjectFact(name="dog"), ObjectFact(name="person"))}
    return Example(
        id=id,
        image=ImageRef(path=f"{id}.png"),
        image_sha256=id,
        prompt="Describe it.",
        facts=Facts(**facts),
        source="test",
    )


def said(text: str, of: Example | None = None, *, stopped: bool = True, **more: Any) -> Completion:
    """An answer; its end of turn is the last token where it stopped."""
    spans = [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]
    spans += [(len(text), len(text))] if stopped or not spans else []
    return Completion(
        example=of or example(),
        text=text,
        token_ids=tuple(range(len(spans))),
        offsets=tuple(spans),
        stopped=stopped,
        **more,
    )


def context(**more: Any) -> RewardContext:
    return RewardContext(**{"vocabulary": COCO, **more})


def words(completion: Completion, spans: Sequence[Any]) -> list[tuple[str, float]]:
    """(text, score) of each span."""
    return [(completion.text[s.start : s.end], s.score) for s in spans]
