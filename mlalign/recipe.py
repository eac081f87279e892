"""A recipe: one YAML, strictly typed. Unknown keys fail with the nearest known name. No torch.

``load(path, overrides)`` reads, overrides (``train.learning_rate=1e-5``), validates and resolves.
"""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mlalign.sections import MethodRef as MethodRef
from mlalign.sections import Recipe as Recipe


class RecipeError(ValueError):
    """A recipe that cannot be run. The message names the file, the key and the mend."""


def load(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """The validated recipe. Raises RecipeError naming the file, every faulty key and the mend."""
    file = Path(path)
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file}: cannot read the recipe ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not a text file in UTF-8; a recipe is YAML") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{file}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}"
        )
    for item in overrides:
        _override(raw, item)
    return from_dict(raw, str(file))


def from_dict(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """The validated recipe of a mapping; ``where`` opens the message of a RecipeError."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{where}:\n" + "\n".join(explain(error, Recipe))) from error


def configure(method: Any, ref: MethodRef, key: str) -> Any:
    """The validated settings of a method that a recipe names under ``key``.

    Raises RecipeError naming the key, what is wrong with it and the nearest known name.
    """
    try:
        return method.Settings(**ref.settings())
    except ValidationError as error:
        lines = explain(error, method.Settings)
        raise RecipeError(f"{key} {ref.name!r}:\n" + "\n".join(lines)) from error


def is_ours(error: BaseException) -> bool:
    """Whether an error is a message for the user: one of our classes, or our code's ValueError.

    Anything else is a fault to be seen with its traceback.
    """
    if type(error).__module__.startswith(("mlalign", "data_builders")):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return isinstance(error, ValueError) and where.startswith(("mlalign", "data_builders"))


def save(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per fault: the dotted key, what is wrong, and the nearest known key."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = _known_keys(model, fault["loc"][:-1])
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            lines.append(f"  {key}: unknown key; {hint}")
        else:
            lines.append(f"  {key or '(recipe)'}: {fault['msg']}")
    return lines


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    current: Any = model
    for part in location:
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return []
        field = current.model_fields.get(str(part))
        if field is None:
            # A union member's name stands in the location where the type is a union.
            continue
        current = _section_of(field.annotation)
    return sorted(current.model_fields) if isinstance(current, type) else []


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if found is not None:
            return found
    return None


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {item!r}: write key=value, e.g. train.learning_rate=1e-5")
    *path, last = key.strip().split(".")
    node: Any = raw
    for part in path:
        index = _index(node, part, item)
        if isinstance(node, dict):
            if node.get(index) is None:
                node[index] = {}
            elif isinstance(node[index], str) and part in (
                "objective",
                "source",
                "judge",
                "writer",
            ):
                node[index] = {"name": node[index]}
        node = node[index]
    value = yaml.safe_load(text)
    if isinstance(value, str):
        # YAML 1.1 reads 1e-5 as text; a number is meant.
        with contextlib.suppress(ValueError):
            value = float(value)
    node[_index(node, last, item)] = value


def _index(node: Any, part: str, item: str) -> str | int:
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise RecipeError(f"override {item!r}: {part!r} lies in {node!r}, which has no keys")
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(
            f"override {item!r}: {part!r} is no item of a list of {len(node)}; count from 0"
        )
    return int(part)
