"""A recipe's keys: all faults of the schema at once, and a recipe to go on with.

A key that cannot be used is left out, or a stand-in takes the place of a mandatory one, and what
remains is validated again: so the rules that need two keys are checked too, and so is the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mlalign.recipe import Recipe, RecipeError, _override, explain
from mlalign.validate.findings import Finding, fault

ROUNDS = 8
"""Faults that show only once another is out of the way: how often to look again."""

STAND_INS: dict[str, Any] = {
    "name": "stand-in",
    "model": {"path": "builtin:microworld"},
    "model.path": "builtin:microworld",
    "data": {"pairs": {"stand-in": "stand-in"}},
    "train": {"objective": "dpo", "learning_rate": 1e-5, "batch_size": 1, "steps": 1},
    "train.objective": "dpo",
    "train.learning_rate": 1e-5,
    "train.batch_size": 1,
}
"""For mandatory keys."""
_CORE = ("objective", "learning_rate", "batch_size", "micro_batch_size", "max_length", "steps")


@dataclass
class Opened:
    """A recipe as far as it can be used."""

    recipe: Recipe | None
    """None where not even stand-ins make it one."""
    findings: list[Finding] = field(default_factory=list)
    stood_in: set[str] = field(default_factory=set)
    """Sections of which a stand-in is checked, so that nothing may be said of them."""


def opened(file: Path, overrides: Sequence[str]) -> Opened:
    """The recipe of a file with its overrides, and every fault of its keys."""
    out = Opened(recipe=None)
    raw = _raw(file, overrides, out.findings)
    if raw is None:
        return out
    told: set[str] = set()
    for _ in range(ROUNDS):
        try:
            out.recipe = Recipe.model_validate(raw)
            return out
        except ValidationError as error:
            for line in _lines(error, raw):
                if line not in told:
                    told.add(line)
                    key, _, problem = line.partition(": ")
                    out.findings.append(fault(str(file), key, problem))
            mended = [_mend(raw, each, out.stood_in) for each in error.errors()]
        if not any(mended):
            return out
    return out


def _raw(file: Path, overrides: Sequence[str], findings: list[Finding]) -> dict[str, Any] | None:
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        findings.append(fault(str(file), "(recipe)", f"cannot be read as YAML ({error})"))
        return None
    if not isinstance(raw, dict):
        keys = ", ".join(Recipe.model_fields)
        findings.append(fault(str(file), "(recipe)", f"not a mapping with the keys {keys}"))
        return None
    for item in overrides:
        try:
            _override(raw, item)
        except (RecipeError, yaml.YAMLError, TypeError) as error:
            findings.append(fault("command line", item, str(error)))
    return raw


def _lines(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """The lines of ``explain``, but for the member of a union that was not meant."""
    faults = error.errors()
    return [
        _arm_of(each, raw) + line.strip().replace(": Value error, ", ": ", 1)
        for each, line in zip(faults, explain(error, Recipe), strict=True)
        if not (_is_literal(each) and _others_below(each["loc"][:-1], faults))
    ]


def _arm_of(each: Any, raw: dict[str, Any]) -> str:
    """What to put before a key of the train section that an arm has for itself: its faults carry
    no place, since they are found when the sections are put together."""
    first = str(each["loc"][0]) if each["loc"] else ""
    if not first or first in raw or first in Recipe.model_fields:
        return ""
    builders = [b for b in raw["data"].get("builders") or [] if isinstance(b, dict)]
    named = [str(b.get("name")) for b in builders if first in (b.get("train") or {})]
    return f"data.builders.{'/'.join(named)}.train." if named else ""


def _is_literal(each: Any) -> bool:
    return bool(each["loc"]) and str(each["loc"][-1]).startswith("literal[")


def _others_below(parent: tuple[Any, ...], faults: Iterable[Any]) -> bool:
    return any(each["loc"][: len(parent)] == parent and not _is_literal(each) for each in faults)


def _mend(raw: dict[str, Any], each: Any, stood_in: set[str]) -> bool:
    """Take one fault out of ``raw``; whether anything changed."""
    location = [str(part) for part in each["loc"]]
    if each["type"] == "value_error" and len(location) < 2:
        return _mend_section(raw, location, each["msg"], stood_in)
    key = ".".join(location[:2])
    if key in STAND_INS and each["type"] != "extra_forbidden":
        section = raw if len(location) == 1 else raw[location[0]]
        section[key.rpartition(".")[2]] = STAND_INS[key]
        if location[0] != "train":
            stood_in.add(location[0])
        return True
    node, last = _walk(raw, location)
    if last is None:
        # A key of an arm's own train section.
        return _mend_section(raw, [], each["msg"], stood_in)
    if isinstance(node, list):
        node.pop(int(last))
    else:
        del node[last]
    return True


def _mend_section(
    raw: dict[str, Any], location: list[str], message: str, stood_in: set[str]
) -> bool:
    """Take out what a rule of several keys is about."""
    before = repr(raw)
    section = location[0] if location else ""
    if section == "train":
        train = raw["train"] | {"epochs": None, "steps": 1}
        # Of what rules of two keys are about, only these say anything of data and memory.
        core = {key: value for key, value in train.items() if key in _CORE}
        raw["train"] = train if "epochs" in message else core
    elif section == "launch":
        raw["launch"]["offload"] = False
    elif "dropout" in message:
        raw["model"]["adapter"].pop("dropout", None)
    else:
        _mend_data(raw["data"], stood_in)
    return repr(raw) != before


def _mend_data(data: dict[str, Any], stood_in: set[str]) -> None:
    """Leave out builders without a source, and an arm's own train keys."""
    builders = data.get("builders") or [] if data.get("source") is not None else []
    data["builders"] = [
        {key: value for key, value in each.items() if key != "train"}
        if isinstance(each, dict)
        else each
        for each in builders
    ]
    if not builders and not data.get("pairs"):
        data["pairs"] = STAND_INS["data"]["pairs"]
        stood_in.add("data")


def _walk(raw: dict[str, Any], location: Sequence[str]) -> tuple[Any, str | None]:
    """The innermost container that a location names, and the key in it; names of a union's members
    stand in the location but not in the recipe."""
    node: Any = raw
    found: tuple[Any, str | None] = (raw, None)
    for part in location:
        if isinstance(node, dict) and part in node:
            found, node = (node, part), node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            found, node = (node, part), node[int(part)]
    return found
