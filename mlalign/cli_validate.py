"""``mlalign validate``: every fault of a recipe and its data at once, before any weight loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, e.g. train.micro_batch_size=2")
]


def validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write JSON there too.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Findings of one kind to list; 0: all.")] = 100,
    no_color: Annotated[bool, typer.Option("--no-color", help="Plain text.")] = False,
) -> None:
    """All faults of recipe, model and data at once; status 1 where there is one.

    No weights are loaded. Shows one pair with the tokens that carry loss, what trains, and a
    report of the data.
    """
    import warnings

    from rich.console import Console
    from transformers.utils import logging

    from mlalign.store import write_json_atomic
    from mlalign.validate.examine import examine
    from mlalign.validate.show import show

    # What they warn of is found here with its row, or has nothing to do with the recipe.
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        outcome = examine(recipe, overrides or [])
    show(outcome, Console(no_color=True if no_color else None, highlight=False), limit=limit)
    if json is not None:
        write_json_atomic(json, outcome.to_json())
    if outcome.faults:
        raise typer.Exit(1)
