"""Train every arm of a recipe: ``deepspeed --num_gpus 2 --module mlalign.train RECIPE``.

``RECIPE`` is a recipe file, or the resolved one in a run folder. Overrides follow as key=value.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mlalign import methods
from mlalign.recipe import Recipe, configure, is_ours, load
from mlalign.runlog import RunLog, probe_faults


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 2 with one message where the recipe or its data cannot be used; 3 from the
    main process where every arm is trained and a probe was disabled on the way."""
    parser = argparse.ArgumentParser(prog="mlalign.train", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help="set by launchers"
    )
    options = parser.parse_args(argv)
    try:
        recipe = load(options.recipe, options.overrides)
        run = run_folder(recipe, Path(options.recipe))
        train_all(recipe, run)
        return _status(recipe, run)
    except Exception as error:
        if is_ours(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
        raise
    finally:
        _leave()


def train_all(recipe: Recipe, run: Path) -> None:
    """Every arm in turn, each in a fresh accelerator state."""
    from mlalign.train import launch

    main_process = launch.rank() == 0
    log = RunLog(run, enabled=main_process)
    for arm in recipe.arms():
        start = time.monotonic()
        if (run / arm / "adapter").is_dir() or (run / arm / "model").is_dir():
            if main_process:
                print(f"{arm}: already trained; remove {run / arm} to train it again", flush=True)
            continue
        ref = recipe.train_of(arm).algorithm
        method = methods.find("mlalign.train.algorithms", ref.name)
        trainer = method(configure(method, ref, "train.algorithm")).train(recipe, arm, run)
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


def _status(recipe: Recipe, run: Path) -> int:
    """0, or that of failed probes, which are named; alone from the main process: a launcher stops
    the others as soon as one ends with anything but 0."""
    from mlalign.train import launch

    faults = probe_faults(run, recipe.arms()) if launch.rank() == 0 else []
    for fault in faults:
        print(fault, file=sys.stderr, flush=True)
    return launch.PROBES_FAILED if faults else 0


def _leave() -> None:
    from mlalign.train import launch

    launch.leave()


if __name__ == "__main__":
    raise SystemExit(main())
