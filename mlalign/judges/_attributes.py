"""Attributes that exclude each other: what makes "a red ball" false of a blue one."""

from __future__ import annotations

COLOURS = (
    "red", "green", "blue", "yellow", "purple", "white", "black", "brown", "orange", "pink",
    "gray", "grey", "tan", "beige", "golden", "silver", "maroon", "turquoise", "teal",
)  # fmt: skip

KINDS: tuple[frozenset[str], ...] = (
    frozenset(COLOURS),
    frozenset({"small", "little", "tiny", "large", "big", "huge", "giant"}),
    frozenset({"young", "old", "elderly"}),
    frozenset({"wet", "dry"}),
    frozenset({"tall", "short"}),
    frozenset({"open", "closed"}),
    frozenset({"empty", "full"}),
    frozenset({"wooden", "metal", "plastic"}),
    frozenset({"striped", "plaid", "spotted"}),
)

_SAME: tuple[frozenset[str], ...] = (
    frozenset({"gray", "grey", "silver"}),
    frozenset({"brown", "tan", "golden", "beige", "maroon"}),
    frozenset({"tan", "beige", "golden", "yellow"}),
    frozenset({"orange", "red", "maroon"}),
    frozenset({"turquoise", "teal", "blue"}),
    frozenset({"turquoise", "teal", "green"}),
    frozenset({"purple", "pink"}),
    frozenset({"small", "little", "tiny"}),
    frozenset({"large", "big", "huge", "giant"}),
    frozenset({"old", "elderly"}),
)
"""Words that people use for one and the same look: never evidence against each other."""


def alike(one: str, two: str) -> bool:
    """The same look, as far as people's words go."""
    return one == two or any(one in group and two in group for group in _SAME)


def kind(word: str) -> frozenset[str]:
    """The words of the same kind, itself included; empty where the kind is unknown."""
    return next((group for group in KINDS if word in group), frozenset())


def contrary(asked: str, known: tuple[str, ...] | frozenset[str]) -> bool:
    """True where a known attribute rules the asked one out: same kind, and none is alike."""
    same_kind = [word for word in known if word in kind(asked)]
    return bool(same_kind) and not any(alike(asked, word) for word in same_kind)
