"""Who may import whom, and the other rules that hold for every file of the repository."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

import pytest

from mlalign import methods
from mlalign.recipe import Recipe
from mlalign.sections import Section
from tests import _syntax

LOW = frozenset({"records", "store", "methods", "runlog", "images", "branching.batch"})
"""What serves every room. These themselves import only what ``MAY`` says."""

MAY: dict[str, set[str]] = {
    "": set(),
    "records": set(),
    "methods": set(),
    "branching.batch": set(),
    "images": {"records"},
    "_rows": {"records"},
    "store": {"records", "_rows"},
    "runlog": {"records", "store", "branching.batch"},
    "sections": set(),
    "recipe": {"sections"},
    "runfolder": {"recipe"},
    "objects": {"records", "vocabularies"},
    "vocabularies": {"objects"},
    "branching": set(),
    "models": {"branching", "recipe"},
    "estimate": {"recipe"},
    "bench": {
        "branching",
        "models",
        "data",
        "objectives",
        "rewards",
        "credit",
        "train",
        "estimate",
        "recipe",
        "microworld",
    },
    "capture": {"models", "branching"},
    "generate": {"models", "branching"},
    "objectives": set(),
    "credit": set(),
    "judges": {"generate", "branching", "models", "objects"},
    "rewards": {"judges", "objects", "branching", "models", "microworld"},
    "probes": {"models", "branching", "capture"},
    "benchmarks": {"objects", "generate", "branching", "models"},
    "data": {"branching", "models"},
    "export": set(),
    "report": {"_rows", "objects", "recipe"},
    "validate": {
        "_rows",
        "branching",
        "models",
        "data",
        "objects",
        "estimate",
        "recipe",
        "train",
    },
    "microworld": {"objects"},
    "photos": {"objects", "models", "branching", "train"},
    "train": {
        "objectives",
        "rewards",
        "credit",
        "probes",
        "benchmarks",
        "data",
        "models",
        "branching",
        "capture",
        "generate",
        "recipe",
        "objects",
        "estimate",
    },
    "data_builders": {"recipe", "judges", "generate", "objects", "models", "microworld"},
}
"""Room -> rooms that it may import, beside itself and LOW. The command line may import anything."""

LAZY: dict[str, set[str]] = {
    "mlalign.microworld.train_base": {"train", "generate", "models", "recipe"},
    "mlalign.microworld.check_base": {"train", "generate", "models", "recipe"},
    "mlalign.microworld.planted_reliance": {"train", "probes", "branching", "models", "recipe"},
}
"""Command-line modules that may import more, inside a function."""

ANYTHING = frozenset(
    {
        "cli",
        "cli_bench",
        "cli_estimate",
        "cli_export",
        "cli_iterate",
        "cli_probe",
        "cli_released",
        "cli_stages",
        "cli_validate",
        "__main__",
    }
)
"""The command line and its stages."""
TRAINERS = frozenset({"trl", "accelerate", "deepspeed"})
GATHERS = {
    "mlalign.probes._weights": {"deepspeed"},
    "mlalign.models._vision": {"deepspeed"},
}
"""Weights that ZeRO-3 shards can be read through DeepSpeed only; inside a function."""
NO_TORCH = frozenset({"", "records", "store", "_rows", "methods", "images", "recipe", "objects"})
HEAVY = frozenset({"torch", "transformers", "trl", "peft", "deepspeed", "accelerate"})

METHOD_ROOMS = (
    "data_builders",
    "data_builders.sources",
    "mlalign.benchmarks",
    "mlalign.export",
    "mlalign.judges",
    "mlalign.models",
    "mlalign.objectives",
    "mlalign.probes",
    "mlalign.rewards",
    "mlalign.train.algorithms",
)
WITHOUT_SETTINGS = frozenset({"mlalign.models"})
"""A family file says what a model is; a recipe sets nothing there."""

LONGEST_FILE = 400


def room(module: str) -> str:
    """The room of a module: what MAY is keyed by."""
    package, _, rest = module.partition(".")
    if package == "data_builders":
        return package
    return "branching.batch" if rest == "branching.batch" else rest.partition(".")[0]


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in _syntax.PACKAGES


def test_every_room_is_in_the_table() -> None:
    rooms = {room(name) for name in _syntax.modules()}
    unknown = rooms - MAY.keys() - ANYTHING
    assert not unknown, f"say in MAY what these may import: {sorted(unknown)}"


def test_rooms_import_only_what_they_may() -> None:
    faults = []
    for name in _syntax.modules():
        here = room(name)
        if here in ANYTHING:
            continue
        serving = frozenset() if here in LOW or here in {"sections", "recipe", "_rows"} else LOW
        for target, line, lazy in _syntax.imports(name):
            there = room(target)
            # The types of a recipe stand in a file of their own.
            there = "recipe" if there == "sections" and here != "recipe" else there
            allowed = MAY[here] | serving | {here, ""} | (LAZY.get(name, set()) if lazy else set())
            if is_ours(target) and there not in allowed:
                faults.append(f"{name}:{line} imports {target}")
    assert not faults, "\n".join(faults)


def test_mlalign_never_imports_the_builders() -> None:
    faults = [
        f"{name}:{line}"
        for name in _syntax.modules()
        if name.startswith("mlalign")
        for target, line, lazy in _syntax.imports(name)
        if target.startswith("data_builders") and not (lazy and room(name) in ANYTHING)
    ]
    assert not faults, faults


def test_third_parties_stay_in_their_rooms() -> None:
    faults = []
    for name in _syntax.modules():
        here = room(name)
        for target, line, lazy in _syntax.imports(name):
            top = target.partition(".")[0]
            gathers = lazy and top in GATHERS.get(name, ())
            trainer = top in TRAINERS and here not in {"train", "bench", *ANYTHING} and not gathers
            framework = here in {"objectives", "credit"} and top in {"transformers", "trl", "peft"}
            heavy = here in NO_TORCH and top in HEAVY
            if trainer or framework or heavy:
                faults.append(f"{name}:{line} imports {top}")
    assert not faults, "\n".join(faults)


def test_records_and_recipes_load_no_torch() -> None:
    code = (
        "import sys, mlalign, mlalign.recipe, mlalign.records, mlalign.store, mlalign.images\n"
        "loaded = sorted({'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules))\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(_syntax.modules()))
def test_module_imports(name: str) -> None:
    importlib.import_module(name)


def method_files() -> list[tuple[str, str]]:
    found = []
    for package in METHOD_ROOMS:
        if package in _syntax.modules():
            found += [(package, name) for name in methods.names(package)]
    return found


def test_there_are_method_files() -> None:
    assert {package for package, _ in method_files()} >= {
        "data_builders",
        "data_builders.sources",
        "mlalign.benchmarks",
        "mlalign.judges",
        "mlalign.models",
        "mlalign.objectives",
        "mlalign.probes",
        "mlalign.rewards",
    }


@pytest.mark.parametrize(("package", "name"), method_files())
def test_method_file_defines_one_method(package: str, name: str) -> None:
    module = importlib.import_module(f"{package}.{name}")
    source = _syntax.tree(_syntax.modules()[module.__name__])
    assigned = [
        node.value
        for node in source.body
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "METHOD" for t in node.targets)
    ]
    assert len(assigned) == 1, f"{module.__name__} assigns METHOD {len(assigned)} times"
    method = methods.find(package, name)
    assert method.__module__ == module.__name__, "METHOD stands in another file"
    assert module.__doc__, "a method file opens with what it is"
    if package not in WITHOUT_SETTINGS:
        settings = method.Settings
        assert settings.model_config.get("extra") == "forbid", "an unknown setting must be refused"
        assert settings.model_config.get("frozen"), "settings must be frozen"


def sections() -> list[type[Section]]:
    found: list[type[Section]] = [Recipe]
    pending = list(Section.__subclasses__())
    while pending:
        each = pending.pop()
        pending += each.__subclasses__()
        found.append(each)
    return sorted(
        {c for c in found if c.__module__ == "mlalign.sections"}, key=lambda c: c.__name__
    )


def test_every_recipe_key_is_read_somewhere() -> None:
    read = {
        node.attr
        for name, path in _syntax.modules().items()
        if name != "mlalign.sections"
        for node in ast.walk(_syntax.tree(path))
        if isinstance(node, ast.Attribute)
    }
    unread = [f"{s.__name__}.{f}" for s in sections() for f in s.model_fields if f not in read]
    assert not unread, f"keys that nothing reads: {unread}"


def test_files_are_short_enough_to_read() -> None:
    long = {
        str(path.relative_to(_syntax.REPOSITORY)): lines
        for path in _syntax.files("mlalign", "data_builders", "tests")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert not long, f"more than {LONGEST_FILE} lines; split: {long}"


def test_no_bare_except() -> None:
    faults = [
        f"{name}:{node.lineno}"
        for name, path in _syntax.modules().items()
        for node in ast.walk(_syntax.tree(path))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not faults, faults


def test_every_package_has_an_init() -> None:
    bare = {
        str(path.parent.relative_to(_syntax.REPOSITORY))
        for path in _syntax.files("mlalign", "data_builders")
        if not (path.parent / "__init__.py").is_file()
    }
    assert not bare, f"no __init__.py in {sorted(bare)}"
