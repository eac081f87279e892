"""The command line: ``mlalign VERB ...``. Everything else is imported inside the verbs."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from mlalign.cli_bench import bench
from mlalign.cli_estimate import estimate
from mlalign.cli_export import export
from mlalign.cli_iterate import iterate
from mlalign.cli_probe import end_of, probe
from mlalign.cli_validate import validate

app = typer.Typer(
    help="Preference alignment for interpretable multimodal LLMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(bench)
app.command()(estimate)
app.command()(export)
app.command()(iterate)
app.command()(probe)
app.command()(validate)
RecipeArgument = Annotated[Path, typer.Argument(help="A recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, e.g. train.learning_rate=1e-5")
]
RunArgument = Annotated[Path, typer.Argument(help="A run folder, runs/<name>.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove the run folder first.")]


def main() -> None:
    """Entry point: our own errors end with one message and status 2; others with a traceback.

    Status 3: everything succeeded, but a probe failed while training and was left out.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Notices of a missing kernel and of a missing GPU, once per import, tell a user nothing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        app()
    except Exception as error:
        from mlalign.recipe import is_ours

        if not is_ours(error):
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(2) from None


@app.command()
def run(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """The whole: build pairs, train, evaluate before and after, report."""
    loaded, folder = _open(recipe, overrides, fresh)
    from mlalign import cli_stages as stages

    with stages.timed(folder, "build"):
        stages.build(loaded, folder)
    with stages.timed(folder, "train"):
        stages.train(loaded, folder)
    if loaded.eval.benchmarks:
        with stages.timed(folder, "evaluate"):
            stages.evaluate(loaded, folder)
    with stages.timed(folder, "report"):
        page = stages.report(folder)
    if loaded.eval.benchmarks:
        stages.print_summary(folder)
    typer.echo(f"report: {page}")
    end_of(loaded.arms(), folder)


@app.command()
def build(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Build the pairs, the held-out examples and the probe set of a recipe."""
    loaded, folder = _open(recipe, overrides, fresh)
    from mlalign import cli_stages as stages

    with stages.timed(folder, "build"):
        stages.build(loaded, folder)
    typer.echo(f"{folder}/data")


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Build what is missing, then train; a run that was stopped resumes."""
    loaded, folder = _open(recipe, overrides, fresh)
    from mlalign import cli_stages as stages

    with stages.timed(folder, "build"):
        stages.build(loaded, folder)
    with stages.timed(folder, "train"):
        stages.train(loaded, folder)
    for arm in loaded.arms():
        typer.echo(f"{arm}: {stages.adapter_of(folder, arm)}")
    end_of(loaded.arms(), folder)


@app.command("eval")
def evaluate(folder: RunArgument) -> None:
    """Evaluate base and aligned models of a trained run; print the table."""
    from mlalign import cli_stages as stages
    from mlalign.recipe import load

    with stages.timed(folder, "evaluate"):
        stages.evaluate(load(folder / "recipe.yaml"), folder)
    stages.print_summary(folder)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, runs/<name>.")],
    out: Annotated[Path | None, typer.Option(help="File; by default RUN/report.html.")] = None,
) -> None:
    """Write the report of a run, or one page that sets several runs side by side (with --out)."""
    from mlalign.report import compare, page

    several = len(folders) > 1
    written = compare.write(folders, out) if several else page.write(folders[0], out)
    typer.echo(f"report: {written}")


@app.command()
def seeds(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, one per seed.")],
) -> None:
    """A Markdown table over runs of one recipe: mean and spread over seeds, before and after."""
    from mlalign.report.seeds import table

    typer.echo(table(folders))


@app.command()
def show(folder: RunArgument, record: Annotated[str, typer.Argument(help="Record id.")]) -> None:
    """Everything that a run knows of one record."""
    from mlalign.report.show import show as text_of

    typer.echo(text_of(folder, record))


@app.command()
def merge(
    folder: RunArgument,
    arm: Annotated[str, typer.Argument(help="Which arm's adapter.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
) -> None:
    """Merge an arm's adapter into its base and save a stock transformers model."""
    from mlalign import cli_stages as stages
    from mlalign.recipe import load

    stages.merge(load(folder / "recipe.yaml"), folder / arm / "adapter", out)
    typer.echo(str(out))


@app.command()
def env() -> None:
    """Versions and hardware, for a bug report."""
    from mlalign import __version__, runfolder

    facts = {"mlalign": __version__, **runfolder.versions(), **runfolder.hardware()}
    typer.echo(json.dumps(facts, indent=1))


def _open(recipe: Path, overrides: list[str] | None, fresh: bool) -> tuple:
    """The loaded recipe and its prepared run folder."""
    from mlalign import cli_stages as stages
    from mlalign import runfolder
    from mlalign.recipe import load

    loaded = load(recipe, overrides or [])
    stages.check(loaded)
    if fresh:
        shutil.rmtree(Path("runs") / loaded.name, ignore_errors=True)
    return loaded, runfolder.prepare(loaded)


if __name__ == "__main__":
    main()
