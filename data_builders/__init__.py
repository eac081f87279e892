"""One file per builder: examples in, preference pairs or counted skips out.

A builder is a class with a ``Settings`` attribute, built as ``METHOD(settings, context)``. It works
on chunks, since generation and judging are batched:

    chunk: int                             examples per call of build_many
    expected: frozenset[str]               reasons for a skip that belong to the method ("nothing
                                           wrong"): counted, but no fault of the data
    seen: Counter[str]                     whole numbers that build_many counts as it goes
    build_many(chunk) -> Iterator[Preference | Skip]
    finish(candidates) -> Iterator[Preference | Skip]
    report(seen) -> dict                   numbers for the manifest

A chunk's outcome depends on its examples, the settings and the seed alone, never on other chunks:
``engine.build`` commits each chunk to disk when it is done and a later start does not redo it. So
nothing is carried from chunk to chunk. What needs all pairs (length balance, a cap on a share) is
decided in ``finish``, which sees every pair of every chunk in order and gives each back, or a Skip
in its place; it may go through ``candidates`` as often as it needs and holds none of them. With
nothing to decide it is ``yield from candidates``. The engine empties ``seen`` before each chunk and
adds the chunks up for ``report``, which is asked after ``finish``.

Every example that gives no pair gives a Skip, so that nothing is lost uncounted. Pair ids are
``{builder}-{example.id}-{k}``. ``engine.build`` runs a builder; ``sources/`` makes the examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from mlalign.records import Example, Preference, Skip

NOT_METHODS = ("edits", "engine", "released")


class Builder(Protocol):
    """What ``engine.build`` asks of a builder."""

    name: str
    chunk: int
    expected: frozenset[str]
    seen: Counter[str]

    def build_many(self, chunk: Sequence[Example]) -> Iterator[Preference | Skip]:
        """Pairs and skips of some examples."""
        ...

    def finish(self, candidates: Iterable[Preference]) -> Iterator[Preference | Skip]:
        """Each of all pairs that build_many made, in order, or a Skip of its id in its place.

        ``candidates`` starts anew whenever it is iterated; images are read from disk when asked
        for.
        """
        ...

    def report(self, seen: Counter[str]) -> dict[str, Any]:
        """Numbers for the manifest, from ``seen`` summed over all chunks."""
        ...
