"""The methods that a recipe names: found by name, their settings validated, all faults at once."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from mlalign import methods
from mlalign.recipe import MethodRef, Recipe, explain
from mlalign.validate.findings import Finding, fault, split_mend

SOURCES = "data_builders.sources"


def method_refs(recipe: Recipe) -> list[tuple[str, str, MethodRef]]:
    """(room, key, reference) of every method that a recipe names."""
    data = recipe.data
    refs: list[tuple[str, str, MethodRef]] = []
    rooms = {"objective": "mlalign.objectives", "algorithm": "mlalign.train.algorithms"}
    trains = {"train": recipe.train}
    trains |= {f"data.builders.{b.name}.train": recipe.train_of(b.name) for b in data.builders}
    for key, train in trains.items():
        for name, room in rooms.items():
            ref = getattr(train, name)
            if ref is not None and (key == "train" or ref != getattr(recipe.train, name)):
                refs.append((room, f"{key}.{name}", ref))
    refs += [("data_builders", "data.builders", ref) for ref in data.builders]
    refs += [("mlalign.probes", "probes.methods", ref) for ref in recipe.probes.methods]
    refs += [("mlalign.benchmarks", "eval.benchmarks", ref) for ref in recipe.eval.benchmarks]
    sources = {
        "data.source": data.source,
        "eval.source": recipe.eval.source,
        "probes.source": recipe.probes.source,
        **{f"data.pairs.{arm}": ref for arm, ref in data.pairs.items()},
    }
    refs += [(SOURCES, key, ref) for key, ref in sources.items() if isinstance(ref, MethodRef)]
    asked = {"data.judge": data.judge, "data.writer": data.writer}
    return refs + [("mlalign.judges", key, ref) for key, ref in asked.items() if ref is not None]


def method_faults(recipe: Recipe, where: str = "recipe") -> list[Finding]:
    """Methods that are not there, with the nearest name, and settings that they refuse.

    An ImportError inside a method's file is raised as it is.
    """
    findings = []
    for room, key, ref in method_refs(recipe):
        findings += _faults(room, key, ref, where)
    return findings


def _faults(room: str, key: str, ref: MethodRef, where: str) -> list[Finding]:
    try:
        method = methods.find(room, ref.name)
    except methods.UnknownMethod as error:
        return [fault(where, key, str(error))]
    except AttributeError as error:
        return [fault(where, key, f"{ref.name!r}: {error}", "Write package.module:Name")]
    if key == "data.writer" and not hasattr(method, "write_many"):
        return [fault(where, key, f"{ref.name!r} answers questions but writes no text")]
    try:
        settings = method.Settings(**ref.settings())
    except ValidationError as error:
        lines = [line.strip().partition(": ") for line in explain(error, method.Settings)]
        return [fault(where, f"{key}.{ref.name}.{name}", problem) for name, _, problem in lines]
    return _unmade(method, settings, key, where) if room == "mlalign.objectives" else []


def _unmade(method: Any, settings: Any, key: str, where: str) -> list[Finding]:
    """What only the making of an objective finds: the terms that it is a sum of."""
    try:
        method(settings)
    except (ValueError, TypeError) as error:
        return [fault(where, key, *split_mend(str(error)))]
    return []
