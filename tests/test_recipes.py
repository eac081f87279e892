"""Every recipe in the repository is read, and none is overlooked."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlalign import methods, recipe
from tests._syntax import REPOSITORY

FOLDER = REPOSITORY / "recipes"
ON_DISK = sorted(p for p in FOLDER.rglob("*") if p.suffix in (".yaml", ".yml"))


def parse(path: Path) -> Any:
    """A recipe by its schema: ``base.yaml`` has that of the ``train_base`` of its room."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(raw, dict), f"{path}: not a mapping"
    if path.name != "base.yaml":
        return recipe.load(path)
    room = importlib.import_module(f"mlalign.{path.parent.name}.train_base")
    if "sft" in raw:
        from mlalign.train.sft import SftSettings

        SftSettings.model_validate(raw["sft"])
    return room.BaseRecipe.model_validate(raw)


def method_refs(parsed: recipe.Recipe) -> list[tuple[str, recipe.MethodRef]]:
    """(room, reference) of every method that a recipe names."""
    refs = [("mlalign.objectives", parsed.train.objective)]
    refs += [("data_builders", ref) for ref in parsed.data.builders]
    refs += [("mlalign.probes", ref) for ref in parsed.probes.methods]
    refs += [("mlalign.benchmarks", ref) for ref in parsed.eval.benchmarks]
    sources = (parsed.data.source, parsed.eval.source)
    refs += [("data_builders.sources", ref) for ref in sources if ref is not None]
    if parsed.data.judge is not None:
        refs.append(("mlalign.judges", parsed.data.judge))
    return refs


def test_every_recipe_on_disk_parses() -> None:
    parsed = [parse(path) for path in ON_DISK]
    assert len(parsed) == len(ON_DISK) > 0


@pytest.mark.parametrize("path", ON_DISK, ids=lambda p: str(p.relative_to(FOLDER)))
def test_recipe_names_what_is_there(path: Path) -> None:
    parsed = parse(path)
    if not isinstance(parsed, recipe.Recipe):
        return
    for room, ref in method_refs(parsed):
        method = methods.find(room, ref.name)
        # The method's own settings refuse an unknown key or a value out of range.
        method.Settings(**ref.settings())


@pytest.mark.parametrize("path", ON_DISK, ids=lambda p: str(p.relative_to(FOLDER)))
def test_a_resolved_recipe_says_the_same(path: Path, tmp_path: Path) -> None:
    parsed = parse(path)
    if not isinstance(parsed, recipe.Recipe):
        return
    recipe.save(parsed, tmp_path / "recipe.yaml")
    assert recipe.load(tmp_path / "recipe.yaml") == parsed


def test_the_three_builders_are_in_the_quickstart() -> None:
    assert set(recipe.load(FOLDER / "quickstart.yaml").arms()) == {"ha_dpo", "povid", "rlaif_v"}


def test_recipe_names_differ() -> None:
    # Two recipes of one name would write into one run folder.
    parsed = [parse(path) for path in ON_DISK]
    names = [p.name for p in parsed if isinstance(p, recipe.Recipe)]
    assert len(names) == len(set(names)), sorted(names)
