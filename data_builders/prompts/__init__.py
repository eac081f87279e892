"""Instructions for a model that does language work: one text file each, read here.

A ``$name`` in a file stands for what the caller fills in; text that is filled in is not read again,
so a dollar sign in it means nothing.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from string import Template


def fill(name: str, **fields: str) -> str:
    """The instruction ``name`` with its fields. Raises KeyError for a field that is not given."""
    return _template(name).substitute(fields)


@cache
def lines(name: str) -> tuple[str, ...]:
    """The lines of ``name`` that are not empty."""
    return tuple(line.strip() for line in _read(name).splitlines() if line.strip())


@cache
def _template(name: str) -> Template:
    return Template(_read(name))


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8").strip()
