"""Train every arm of a recipe: ``deepspeed --num_gpus 2 --module mlalign.train RECIPE``.

``RECIPE`` is a recipe file, or the resolved one in a run folder. Overrides follow as key=value.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mlalign.recipe import Recipe, is_ours, load
from mlalign.runlog import RunLog


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one message where the recipe or its data cannot be used."""
    parser = argparse.ArgumentParser(prog="mlalign.train", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help="set by launchers"
    )
    options = parser.parse_args(argv)
    try:
        recipe = load(options.recipe, options.overrides)
        train_all(recipe, run_folder(recipe, Path(options.recipe)))
    except ValueError as error:
        if is_ours(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
        raise
    finally:
        _leave()
    return 0


def train_all(recipe: Recipe, run: Path) -> None:
    """Every arm in turn, each in a fresh accelerator state."""
    from mlalign.train import launch
    from mlalign.train.preference import train_arm

    main_process = launch.rank() == 0
    log = RunLog(run, enabled=main_process)
    for arm in recipe.arms():
        start = time.monotonic()
        if (run / arm / "adapter").is_dir() or (run / arm / "model").is_dir():
            if main_process:
                print(f"{arm}: already trained; remove {run / arm} to train it again", flush=True)
            continue
        trainer = train_arm(recipe, arm, run)
        seconds = round(time.monotonic() - start, 1)
        log.event(arm, "trained", seconds=seconds, steps=trainer.state.global_step)
        if main_process:
            print(f"{arm}: {trainer.state.global_step} steps in {seconds} s", flush=True)
        launch.forget(trainer)


def run_folder(recipe: Recipe, file: Path) -> Path:
    """The folder of a resolved recipe that lies in one, else ``runs/<name>``."""
    if file.name == "recipe.yaml" and (file.parent / "manifest.json").is_file():
        return file.parent
    return Path("runs") / recipe.name


def _leave() -> None:
    from mlalign.train import launch

    launch.leave()


if __name__ == "__main__":
    raise SystemExit(main())
