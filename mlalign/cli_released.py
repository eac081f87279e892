"""The part of ``mlalign build`` that reads released preference sets (``data.pairs``)."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mlalign import methods
from mlalign.recipe import MethodRef, Recipe, RecipeError, configure

KEY = "data.pairs."


def refs(recipe: Recipe) -> list[tuple[str, MethodRef]]:
    """(key, source) of every arm whose pairs a source reads from a release."""
    pairs = recipe.data.pairs.items()
    return [(KEY + arm, ref) for arm, ref in pairs if isinstance(ref, MethodRef)]


def check(recipe: Recipe) -> None:
    """A release gives pairs, any other source examples: each under its own key. RecipeError."""
    named = [(key, ref, "pairs", "data.source") for key, ref in refs(recipe)]
    sources = {
        "data.source": recipe.data.source,
        "eval.source": recipe.eval.source,
        "probes.source": recipe.probes.source,
    }
    named += [(k, ref, "examples", f"{KEY}<arm>") for k, ref in sources.items() if ref is not None]
    for key, ref, wanted, other in named:
        if not hasattr(methods.find("data_builders.sources", ref.name), wanted):
            raise RecipeError(
                f"{key}: source {ref.name!r} gives no {wanted}. Name it under {other}"
            )


def build(recipe: Recipe, run: Path, console: Console) -> None:
    """Read the releases that are not there yet into ``run/data/<arm>``."""
    from data_builders import released

    data = recipe.data
    for key, ref in refs(recipe):
        arm = key.removeprefix(KEY)
        if (run / "data" / arm / "manifest.json").is_file():
            continue
        method = methods.find("data_builders.sources", ref.name)
        manifest = released.build(
            method(configure(method, ref, key)),
            out_folder=run / "data" / arm,
            max_skipped=data.max_skipped,
            limit=data.examples,
            seed=recipe.seed,
        )
        skipped = {reason: entry["count"] for reason, entry in manifest["skipped"].items()}
        console.print(
            f"  {arm}: {manifest['pairs']} pairs of {manifest['records']} records from "
            f"{ref.name}; skipped: {skipped or 'none'}"
        )
