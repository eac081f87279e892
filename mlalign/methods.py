"""Find the one method that a file defines, by the file's name. Standard library only.

A room is a package whose modules each define one method; the name in a recipe is the module's
name. There is no list to edit. ``package.module:Name`` reaches a method outside this repository.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from types import ModuleType
from typing import Any


class UnknownMethod(ValueError):
    """No such method; the message lists those that are there."""


def names(room: str) -> list[str]:
    """The methods of a room, sorted. Modules whose name starts with ``_`` are not methods."""
    package = importlib.import_module(room)
    return sorted(
        m.name
        for m in pkgutil.iter_modules(package.__path__)
        if not m.name.startswith("_") and not m.ispkg and m.name not in _helpers(package)
    )


def find(room: str, name: str) -> Any:
    """The class or function that module ``room.name`` declares by ``METHOD = <it>``.

    ``name`` may be ``package.module:Attribute``. An ImportError inside the module is raised as it
    is. Raises UnknownMethod where there is no such module.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        return getattr(importlib.import_module(module_name), attribute)
    known = names(room)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownMethod(f"no {name!r} in {room}.{hint} There are: {', '.join(known)}")
    module = importlib.import_module(f"{room}.{name}")
    if not hasattr(module, "METHOD"):
        raise UnknownMethod(f"{room}/{name}.py defines no METHOD: a method file ends with one")
    return module.METHOD


def _helpers(package: ModuleType) -> frozenset[str]:
    """Modules of a room that are not methods (a room's shared parts), as the room declares them."""
    return frozenset(getattr(package, "NOT_METHODS", ()))
