"""Which yes/no questions are worth asking of an image, and which of them make pairs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from mlalign.judges import Answer
from mlalign.records import Facts


def presence_names(facts: Facts, said: set[str], vocabulary: Any, rng: random.Random) -> list[str]:
    """Objects whose presence is asked: what is there, unsaid things first, then its typical
    companions that are not there, and two others."""
    names = sorted(facts.names())
    companions = vocabulary.companions
    typical = sorted({c for n in names for c in companions.get(n, ())[:2] if c not in names})
    others = [n for n in vocabulary.names if n not in names and n not in typical]
    # Some that nothing speaks for, so that no image is without questions to deny.
    typical += rng.sample(others, min(2, len(others)))
    return sorted(names, key=lambda n: (n in said, n)) + typical


def pick(
    truth: Mapping[str, Answer],
    own: Mapping[str, Answer],
    rng: random.Random,
    *,
    count: int,
    only_mistakes: bool,
) -> list[str]:
    """At most ``count`` questions, truths of yes and of no in turn, the model's mistakes first.

    ``truth`` and ``own``: what is true and what the model says, by question. A question without a
    truth is left out, and with ``only_mistakes`` one that the model answers rightly.
    """
    asked = list(truth)
    ranked: dict[bool, list[str]] = {True: [], False: []}
    for question in asked:
        verdict = truth[question].verdict
        if verdict is None:
            continue
        mistaken = own[question].verdict is not verdict
        if mistaken or not only_mistakes:
            ranked[verdict].append(question)
    order = {question: rng.random() for question in asked}
    for verdict, questions in ranked.items():
        questions.sort(key=lambda q, v=verdict: (own[q].verdict is v, order[q]))
    picked = []
    turn = rng.random() < 0.5
    while len(picked) < count and ranked[turn]:
        # Truths in turn: a surplus of "no" would teach denial.
        picked.append(ranked[turn].pop(0))
        turn = not turn
    return picked
