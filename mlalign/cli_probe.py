"""``mlalign probe``: the recipe's probes on a saved checkpoint, on an adapter, on a whole model."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

PROBED = "probed"
"""Ends the names under which this verb writes; key of the manifest that says of what."""
UNKNOWN_STEP = 1
"""Where the readings of what another program trained stand: not 0, where nothing is trained."""


class ProbeVerbError(ValueError):
    """Something to probe that is not there. The message names it and the mend."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is probed against the recipe's base."""

    label: str
    """Arm under which it is written."""
    step: int
    folder: Path
    """A PEFT adapter, or a whole model."""
    arm: str = ""
    """Arm of the run that it was trained in; "" where it was not."""

    @property
    def is_adapter(self) -> bool:
        """Whether it goes on top of the base."""
        return (self.folder / "adapter_config.json").is_file()


def probe(
    run: Annotated[Path, typer.Argument(help="A run folder, runs/<name>.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. probes.methods=[image_reliance]")
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(help="Step of a saved checkpoint; without: the result.")
    ] = None,
    arm: Annotated[str | None, typer.Option(help="One arm; without: all.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT adapter that this run did not train.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A whole model (merged, or fully fine-tuned).")
    ] = None,
    probe_set: Annotated[
        Path | None, typer.Option(help="Folder of another probe set; without: the run's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; without: the run.")] = None,
) -> None:
    """Read the run's probes off a checkpoint, an adapter or a model; all tiers.

    Writes probes/<arm>.probed/ and metrics as training does. Status 3 where a probe failed.
    """
    from mlalign import cli_stages as stages
    from mlalign.recipe import load
    from mlalign.runlog import RunLog
    from mlalign.train.launch import PROBES_FAILED

    if not (run / "recipe.yaml").is_file():
        raise ProbeVerbError(f"{run}: no recipe.yaml; give a run folder, runs/<name>")
    recipe = load(run / "recipe.yaml", overrides or [])
    if not recipe.probes.methods:
        raise ProbeVerbError("the recipe names no probes: add probes.methods=[image_reliance, ...]")
    records = probe_set or run / "probe_set"
    if not (records / "records.jsonl").is_file():
        raise ProbeVerbError(f"{records}: no probe set; build the run, or give --probe-set DIR")
    log = RunLog(out or run)
    failed = False
    for subject in subjects(recipe, run, checkpoint, arm, adapter, model):
        stages.console.print(f"[bold]{subject.label}[/bold] step {subject.step}: {subject.folder}")
        failed |= _probe(recipe, run, subject, records, log)
    if failed:
        raise typer.Exit(PROBES_FAILED)


def subjects(
    recipe: Any,
    run: Path,
    checkpoint: int | None,
    arm: str | None,
    adapter: Path | None,
    model: Path | None,
) -> Iterator[Subject]:
    """What the options name. Raises ProbeVerbError for what is not there, or for too much."""
    outside = [each for each in (adapter, model) if each is not None]
    if len(outside) > 1 or (outside and (checkpoint is not None or arm is not None)):
        raise ProbeVerbError("give one of --adapter, --model, and (--checkpoint, --arm)")
    for folder in outside:
        wanted = "adapter_config.json" if adapter else "config.json"
        if not (folder / wanted).is_file():
            raise ProbeVerbError(f"{folder}: no {wanted}; give the folder that holds it")
        place = folder.resolve()
        name = place.parent.name if place.name in ("adapter", "model", "merged") else place.name
        yield Subject(label=f"{name}.{PROBED}", step=UNKNOWN_STEP, folder=folder)
    if outside:
        return
    if arm is not None and arm not in recipe.arms():
        raise ProbeVerbError(f"--arm {arm}: the run has {', '.join(recipe.arms())}")
    for each in recipe.arms() if arm is None else [arm]:
        found = _result(run, each) if checkpoint is None else _checkpoint(run, each, checkpoint)
        yield Subject(label=f"{each}.{PROBED}", step=found[0], folder=found[1], arm=each)


def _checkpoint(run: Path, arm: str, step: int) -> tuple[int, Path]:
    from mlalign.train.checkpoints import MANIFEST

    folder = run / arm / "checkpoints"
    target = folder / f"checkpoint-{step}"
    if not (target / MANIFEST).is_file():
        there = sorted(int(f.parent.name.rpartition("-")[2]) for f in folder.glob(f"*/{MANIFEST}"))
        raise ProbeVerbError(
            f"{target}: no complete checkpoint; {arm} has {', '.join(map(str, there)) or 'none'} "
            "(train.save_every makes them, and the last two are kept)"
        )
    return step, target


def _result(run: Path, arm: str) -> tuple[int, Path]:
    """The arm's adapter or model, and the step that it is of."""
    from mlalign.cli_stages import adapter_of
    from mlalign.runlog import read_lines

    folder = adapter_of(run, arm)
    if folder is None:
        raise ProbeVerbError(f"{run / arm}: not trained yet. Train it, or give --checkpoint STEP")
    best = run / arm / "best" / "heldout.json"
    if best.is_file():
        return int(json.loads(best.read_text(encoding="utf-8"))["step"]), folder
    events = [e for e in read_lines(run / "events.jsonl") if e["event"] == "trained"]
    return next((e["steps"] for e in reversed(events) if e["arm"] == arm), UNKNOWN_STEP), folder


def _probe(recipe: Any, run: Path, subject: Subject, records: Path, log: Any) -> bool:
    """One subject's pass, written and printed; whether a probe failed."""
    from mlalign.runlog import RunLog
    from mlalign.train import probe_callback as during
    from mlalign.train.cadence import now

    source = str((run / subject.arm if subject.arm else subject.folder).resolve())
    before = log.manifest(PROBED, subject.label).get("source", source)
    if before != source:
        raise ProbeVerbError(
            f"{log.folder}/probes/{subject.label} holds readings of {before}; give --out DIR"
        )
    probes = _pass_over(recipe, subject, records)
    if subject.arm:
        # What a probe carries from the pass before, so that this one reads what training read.
        trained = RunLog(run, enabled=False)
        earlier = [s for s in trained.remembered_steps(subject.arm) if s < subject.step]
        if earlier:
            probes.recall(during.nested(trained.remembered(subject.arm, earlier[-1])))
    start = now()
    readings = probes.run(subject.step, rare=recipe.probes.rare)
    log.rewind(subject.label, subject.step - 1, until=subject.step)
    log.add_to_manifest(PROBED, subject.label, {"source": source})
    during.write_pass(probes, readings, log, subject.label, subject.step, start)
    _print(probes, readings, subject)
    for note in probes.notes:
        typer.echo(note)
    for name, text in probes.failed.items():
        file = log.traceback(subject.label, name, text)
        last = text.strip().splitlines()[-1]
        typer.secho(f"probe {name} failed: {last} (traceback: {file})", fg="red", err=True)
    return bool(probes.failed)


def _pass_over(recipe: Any, subject: Subject, records: Path) -> Any:
    """A pass whose model is the subject and whose base is the recipe's.

    Against a whole model the base is read first and its side kept; then the weights change places,
    so that never two models are held.
    """
    from mlalign.models.loading import load_vlm
    from mlalign.train.probe_callback import pass_of

    if subject.is_adapter:
        vlm = load_vlm(recipe.model, adapter=subject.folder, device="auto")
        return pass_of(recipe, vlm, records, progress=True)
    vlm = load_vlm(recipe.model, device="auto")
    shapes = _shapes(vlm.model)
    probes = pass_of(recipe, vlm, records, progress=True)
    probes.run(0, rare=recipe.probes.rare)
    vlm.model = None
    gc.collect()
    keys = {"path": str(subject.folder), "revision": None, "start_adapter": None}
    vlm.model = load_vlm(recipe.model.model_copy(update=keys), device="auto").model
    other = _shapes(vlm.model)
    changed = [name for name in sorted(shapes | other) if shapes.get(name) != other.get(name)]
    if changed:
        raise ProbeVerbError(
            f"{subject.folder}: not the architecture of {recipe.model.path}: {len(changed)} "
            f"weights differ in name or shape, e.g. {changed[0]}. Give the recipe of its own base"
        )
    return probes


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def _print(probes: Any, readings: Sequence[Any], subject: Subject) -> None:
    """The means over the set of every probe's headline side."""
    from rich.console import Console
    from rich.table import Table

    headline = {each.name: each.headline for each in probes.methods}
    table = Table(title=f"{subject.label}, step {subject.step}")
    for name in ("probe", "reading", "of"):
        table.add_column(name, overflow="fold")
    for name in ("mean", "95 % interval", "noise", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in readings:
        if r.record or max(r.layer, r.head, r.neuron) >= 0 or r.side != headline[r.probe]:
            continue
        between = "" if r.lo != r.lo else f"{r.lo:.4g} to {r.hi:.4g}"
        noise = "" if r.noise != r.noise else f"{r.noise:.2g}"
        table.add_row(r.probe, r.metric, r.group, f"{r.value:.4g}", between, noise, str(r.n))
    console = Console()
    console = console if console.width >= 100 else Console(width=100)
    console.print(table)


def end_of(arms: Sequence[str], *runs: Path) -> None:
    """Name the probes that were disabled while ``arms`` trained; status 3 where any was."""
    from mlalign.runlog import probe_faults
    from mlalign.train.launch import PROBES_FAILED

    faults = [fault for run in runs for fault in probe_faults(run, arms)]
    for fault in faults:
        typer.secho(fault, fg="red", err=True)
    if faults:
        raise typer.Exit(PROBES_FAILED)
