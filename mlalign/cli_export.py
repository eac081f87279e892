"""``mlalign export``: pairs as TRL, LLaMA-Factory or ms-swift take them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Pairs = Annotated[
    Path,
    typer.Argument(help="runs/NAME/data/ARM, or any pair file with TRL's columns."),
]
Out = Annotated[Path, typer.Argument(help="New folder.")]
SettingsArgument = Annotated[
    list[str] | None, typer.Argument(help="key=value of the exporter, e.g. dataset=mine")
]
To = Annotated[str, typer.Option("--to", help="Whose format: a file of mlalign/export, e.g. trl.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave faulty rows out, counted.")]


def export(
    pairs: Pairs,
    out: Out,
    settings: SettingsArgument = None,
    *,
    to: To,
    skip_bad: SkipBad = False,
) -> None:
    """Write pairs for another framework; its format's own settings follow as key=value."""
    from mlalign import methods
    from mlalign.export import export as write
    from mlalign.recipe import MethodRef, configure

    method = methods.find("mlalign.export", to)
    exporter = method(configure(method, MethodRef(name=to, **_values(settings or [])), "--to"))
    done = write(exporter, pairs, out, skip_bad=skip_bad)
    typer.echo(f"{out}: {done['pairs']} pairs for {to}")
    for key, what in (("skipped", "rows skipped"), ("left_out", "pairs that lose")):
        for name, count in done[key].items():
            typer.echo(f"  {what}: {count} x {name}")


def _values(items: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key or key == "name":
            raise typer.BadParameter(f"{item!r}: write key=value")
        # A shell passes the two characters of a line break.
        values[key] = value.replace("\\n", "\n")
    return values
