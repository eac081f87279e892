"""One file per builder: examples in, preference pairs or counted skips out.

A builder is a class with a ``Settings`` attribute, built as ``METHOD(settings, context)``. It works
on chunks, since generation and judging are batched:

    chunk: int                             examples per call of build_many
    expected: frozenset[str]               reasons for a skip that belong to the method ("nothing
                                           wrong"): counted, but no fault of the data
    build_many(chunk) -> Iterator[Preference | Skip]
    finish() -> Iterator[Preference | Skip]    what was held back until all examples were seen
    report() -> dict                       numbers for the manifest

Every example that gives no pair gives a Skip, so that nothing is lost uncounted. Pair ids are
``{builder}-{example.id}-{k}``. ``engine.build`` runs a builder; ``sources/`` makes the examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from mlalign.records import Example, Preference, Skip

NOT_METHODS = ("engine",)


class Builder(Protocol):
    """What ``engine.build`` asks of a builder."""

    name: str
    chunk: int
    expected: frozenset[str]

    def build_many(self, chunk: Sequence[Example]) -> Iterator[Preference | Skip]:
        """Pairs and skips of some examples."""
        ...

    def finish(self) -> Iterator[Preference | Skip]:
        """Pairs and skips that had to wait for the last example."""
        ...

    def report(self) -> dict[str, Any]:
        """Numbers for the manifest."""
        ...
