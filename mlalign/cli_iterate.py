"""``mlalign iterate``: build, train, merge, and again from what came of it (RLAIF-V's rounds)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlalign.cli_probe import end_of


def iterate(
    recipe: Annotated[Path, typer.Argument(help="A recipe with one builder (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. train.learning_rate=1e-5")
    ] = None,
    rounds: Annotated[int, typer.Option(help="How many rounds.")] = 4,
) -> None:
    """Rounds of one recipe: each generates, scores and trains with the model of the last one.

    Round N is the run runs/<name>-round<N>, with seed + N - 1; its base is the merged model of
    round N - 1. Stopped at any moment, the same command goes on where it was: every stage of every
    round is skipped where its result is there.
    """
    from mlalign import cli_stages as stages
    from mlalign import runfolder
    from mlalign.recipe import load

    loaded = load(recipe, overrides or [])
    (arm,) = _one_arm(loaded.arms())
    if loaded.model.quantize != "none":
        raise stages.StageError(
            "iterate merges each round's adapter into the weights, which model.quantize: "
            f"{loaded.model.quantize} does not allow. Give model.quantize: none"
        )
    before: Path | None = None
    runs: list[Path] = []
    for number in range(1, rounds + 1):
        changed: dict[str, Any] = {
            "name": f"{loaded.name}-round{number}",
            "seed": loaded.seed + number - 1,
        }
        if before is not None:
            model = {"path": str(before), "start_adapter": None, "revision": None}
            changed["model"] = loaded.model.model_copy(update=model)
        this = loaded.model_copy(update=changed)
        stages.check(this)
        run = runfolder.prepare(this)
        runs.append(run)
        stages.console.print(f"[bold]round {number} of {rounds}[/bold]: {run}")
        with stages.timed(run, "build"):
            stages.build(this, run)
        with stages.timed(run, "train"):
            stages.train(this, run)
        if this.eval.benchmarks:
            with stages.timed(run, "evaluate"):
                stages.evaluate(this, run)
            stages.print_summary(run)
        before = _merged(this, run, arm)
    typer.echo(f"the last round's model: {before}")
    end_of([arm], *runs)


def _one_arm(arms: list[str]) -> list[str]:
    from mlalign.cli_stages import StageError

    if len(arms) != 1:
        raise StageError(
            f"iterate trains one adapter a round, but the recipe has {len(arms)}: "
            f"{', '.join(arms)}. Leave one of data.builders"
        )
    return arms


def _merged(recipe: Any, run: Path, arm: str) -> Path:
    """The round's result as a stock model folder."""
    from mlalign import cli_stages as stages

    result = stages.adapter_of(run, arm)
    assert result is not None
    if result.name == "model":
        return result
    target = run / arm / "merged"
    if not target.is_dir():
        with stages.timed(run, "merge"):
            stages.merge(recipe, result, target)
    return target
