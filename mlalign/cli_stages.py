"""The stages of a run, one function each. Every stage is skipped where its result is there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from mlalign import cli_released, methods, runfolder, store
from mlalign.recipe import MethodRef, Recipe, RecipeError, configure
from mlalign.records import Example, Skip

console = Console(soft_wrap=True)


class StageError(ValueError):
    """A stage that cannot run. The message names what is missing and the mend."""


@contextlib.contextmanager
def timed(run: Path, stage: str) -> Iterator[None]:
    """Print the stage and its seconds, and keep them in the manifest."""
    console.print(f"[bold]{stage}[/bold]")
    start = time.monotonic()
    yield
    seconds = round(time.monotonic() - start, 1)
    console.print(f"[dim]{stage}: {seconds} s[/dim]")
    runfolder.add(run, seconds={stage: seconds})


def check(recipe: Recipe) -> None:
    """Find every method that the recipe names and validate its settings, before anything loads.

    Raises RecipeError with every fault, naming the key and the nearest known name, and ModelError
    for a model folder that is not there.
    """
    from mlalign.validate.methods import method_faults

    faults = method_faults(recipe)
    if faults:
        raise RecipeError("\n".join(found.text for found in faults))
    cli_released.check(recipe)
    _resolve_model(recipe)


def build(recipe: Recipe, run: Path) -> None:
    """Pairs of every builder, the held-out examples, and the probe set."""
    if recipe.data.source is not None and recipe.data.builders:
        _build_pairs(recipe, run)
    cli_released.build(recipe, run, console)
    _prompts(recipe, run)
    for arm in recipe.arms():
        path = recipe.pairs_of(arm, run)
        if not path.exists():
            raise StageError(
                f"data.pairs.{arm}: {path} does not exist. Give a file or folder of pairs, or the "
                f"source of a released set: {{name: ..., path: ...}}"
            )
        runfolder.add(run, data={arm: store.fingerprint(path)})
    if recipe.eval.benchmarks:
        _hold_out(recipe, run)
    if recipe.probes.methods:
        _probe_set(recipe, run)


def train(recipe: Recipe, run: Path) -> None:
    """Start the launcher on the resolved recipe. Raises StageError where training failed."""
    from mlalign.train import launch

    if all(adapter_of(run, arm) for arm in recipe.arms()):
        return
    command = launch.command(recipe.launch, run / "recipe.yaml")
    console.print(f"[dim]{' '.join(command)}[/dim]")
    log = run / "train.log"
    with log.open("w", encoding="utf-8") as handle:
        status = _follow(command, launch.environment(recipe.launch), handle)
    missing = [arm for arm in recipe.arms() if adapter_of(run, arm) is None]
    if status not in (0, launch.PROBES_FAILED) or missing:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-25:])
        raise StageError(
            f"training ended with status {status}; not trained: {', '.join(missing) or 'none'}. "
            f"The whole log is {log}; its end:\n{tail}"
        )


def evaluate(recipe: Recipe, run: Path) -> dict[str, Any]:
    """Base and every arm on the held-out examples; writes and returns summary.json."""
    from mlalign.benchmarks import evaluate as ev
    from mlalign.objects import vocabulary

    words = vocabulary(recipe.data.vocabulary)
    section, seed = recipe.eval, recipe.seed
    before = _evaluated(recipe, run, "base", None, words)
    builders: dict[str, Any] = {}
    for arm in recipe.arms():
        after = _evaluated(recipe, run, arm, adapter_of(run, arm), words)
        scores = [ev.load_scores(run, label, section, words) for label in ("base", arm)]
        change = ev.compare(*scores, resamples=section.bootstrap, seed=seed)
        builders[arm] = {"before": before, "after": after, "change": change}
    summary = {"seed": seed, "builders": builders}
    store.write_json_atomic(run / "summary.json", summary)
    return summary


def report(run: Path) -> Path:
    """Write report.html."""
    from mlalign.report import page

    return page.write(run)


def merge(recipe: Recipe, adapter: Path, out: Path) -> None:
    """Merge an adapter into its base and save a stock transformers model, whole or not at all."""
    from mlalign.models.loading import load_vlm

    vlm = load_vlm(recipe.model, adapter=adapter)
    with store.folder_atomic(out) as aside:
        vlm.model.merge_and_unload().save_pretrained(aside)
        vlm.processor.save_pretrained(aside)


def print_summary(run: Path) -> None:
    """The before/after table of a finished run."""
    from mlalign.report.table import WIDTH, summary_table

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    Console(width=max(console.width, WIDTH)).print(summary_table(summary))


def adapter_of(run: Path, arm: str) -> Path | None:
    """What training left for an arm: an adapter, or a whole model; None where there is nothing."""
    for name in ("adapter", "model"):
        if (run / arm / name).is_dir():
            return run / arm / name
    return None


def source_of(ref: MethodRef) -> Any:
    """The source that a recipe names, with its settings."""
    method = methods.find("data_builders.sources", ref.name)
    return method(configure(method, ref, "source"))


def _resolve_model(recipe: Recipe) -> None:
    from mlalign.models.loading import resolve_path

    resolve_path(recipe.model.path)


def _build_pairs(recipe: Recipe, run: Path) -> None:
    from data_builders import engine
    from data_builders._context import BuildContext

    data = recipe.data
    todo = []
    for ref in data.builders:
        if (run / "data" / ref.name / "manifest.json").is_file():
            engine.sweep(run / "data" / ref.name)
        else:
            todo.append(ref)
    if not todo:
        return
    assert data.source is not None
    source = source_of(data.source)
    context = _context(recipe, source, BuildContext)
    about = _decided_by(recipe, source, context)
    for ref in todo:
        method = methods.find("data_builders", ref.name)
        limit = ref.examples or data.examples
        manifest = engine.build(
            method(configure(method, ref, "data.builders"), context),
            partial(source.examples, "train", limit, recipe.seed),
            out_folder=run / "data" / ref.name,
            max_skipped=data.max_skipped,
            desc=ref.name,
            about={**about, "examples": limit},
            total=limit,
            asked=partial(_asked, context),
        )
        skipped = {reason: entry["count"] for reason, entry in manifest["skipped"].items()}
        console.print(
            f"  {ref.name}: {manifest['pairs']} pairs from {manifest['records']} records in "
            f"{manifest['seconds']:.0f} s ({manifest['records_per_second']:g} records/s); "
            f"skipped: {skipped or 'none'}"
        )


def _decided_by(recipe: Recipe, source: Any, context: Any) -> dict[str, Any]:
    """What decides the pairs beside a builder's settings: a stopped build goes on with the same."""
    from mlalign.models._fingerprint import reference_key

    data = recipe.data
    key = dataclasses.asdict(reference_key(recipe.model, context.vlm, "pairs"))
    del key["data"]
    return {
        "source": source.fingerprint(),
        "vocabulary": data.vocabulary,
        "seed": recipe.seed,
        "model": {**key, "device": context.vlm.device.type},
        "judge": data.judge and data.judge.model_dump(mode="json"),
        "writer": data.writer and data.writer.model_dump(mode="json"),
    }


def _asked(context: Any) -> dict[str, Any]:
    """What judge and writer say of their requests (counts, tokens, cost), where they say it."""
    return {
        key: model.report()
        for key, model in (("judge_report", context.judge), ("writer_report", context.writer))
        if hasattr(model, "report")
    }


def _context(recipe: Recipe, source: Any, context_class: Any) -> Any:
    from mlalign.models.loading import load_vlm
    from mlalign.objects import vocabulary

    words = vocabulary(recipe.data.vocabulary)
    vlm = load_vlm(recipe.model, device="auto")
    judge = None
    if recipe.data.judge is not None:
        method = methods.find("mlalign.judges", recipe.data.judge.name)
        settings = configure(method, recipe.data.judge, "data.judge")
        judge = method(settings, vlm=vlm, vocabulary=words)
    writer, ref = None, recipe.data.writer
    if ref is not None:
        method = methods.find("mlalign.judges", ref.name)
        if not hasattr(method, "write_many"):
            raise StageError(
                f"data.writer: judge {ref.name!r} answers questions but writes no text"
            )
        settings = configure(method, ref, "data.writer")
        # One and the same model is loaded, or one server spoken to, once.
        same = judge is not None and ref == recipe.data.judge
        writer = judge if same else method(settings, vlm=vlm, vocabulary=words)
    return context_class(
        vocabulary=words,
        language=source.language,
        seed=recipe.seed,
        vlm=vlm,
        judge=judge,
        writer=writer,
        writer_name="" if ref is None else f"{ref.name} {_model_of(ref, recipe)}",
    )


def _model_of(ref: MethodRef, recipe: Recipe) -> str:
    """The model that a judge or writer asks: its own, or the run's."""
    return str(ref.settings().get("model") or recipe.model.path)


def _prompts(recipe: Recipe, run: Path) -> None:
    """Examples whose prompts the policy is to answer."""
    folder = run / "data" / recipe.train.algorithm.name
    if not recipe.data.prompts or (folder / "manifest.json").is_file():
        return
    assert recipe.data.source is not None
    source = source_of(recipe.data.source)
    examples, skips = _examples(source, "train", recipe.data.prompts, recipe.seed)
    counts = dict(Counter(skip.reason for skip in skips))
    store.write_examples(folder, examples, {"skipped": counts})
    console.print(f"  {folder.name}: {len(examples)} prompts; skipped: {counts or 'none'}")


def _hold_out(recipe: Recipe, run: Path) -> None:
    folder = run / "data" / "heldout"
    if (folder / "manifest.json").is_file():
        return
    ref = recipe.eval.source or recipe.data.source
    if ref is None:
        raise StageError("eval.benchmarks need eval.source (or data.source): images with facts")
    examples, skips = _examples(source_of(ref), "heldout", recipe.eval.images, recipe.seed)
    store.write_examples(folder, examples, {"skipped": [skip.detail for skip in skips]})
    runfolder.add(run, data={"heldout": store.fingerprint(folder)})


def _probe_set(recipe: Recipe, run: Path) -> None:
    """Own greedy answers of the base model, with a reference pair, on images of their own."""
    from data_builders._context import BuildContext
    from mlalign.generate import Decoding, Request, generate
    from mlalign.probes import _records

    folder = run / "probe_set"
    if (folder / "records.jsonl").is_file():
        return
    ref = recipe.probes.source or recipe.data.source
    if ref is None:
        raise StageError("probes.methods need probes.source (or data.source): images with facts")
    source = source_of(ref)
    examples, _ = _examples(source, "probe", 2 * recipe.probes.records, recipe.seed)
    # By rule also where a model writes the pairs: the probe set is the same in every such run.
    by_rule = recipe.data.model_copy(update={"writer": None})
    context = _context(recipe.model_copy(update={"data": by_rule}), source, BuildContext)
    povid = methods.find("data_builders", "povid")
    builder = povid(povid.Settings(), context)
    candidates = [made for made in builder.build_many(examples) if not isinstance(made, Skip)]
    pairs: dict[str, Any] = {}
    for made in builder.finish(candidates):
        if not isinstance(made, Skip):
            pairs.setdefault(made.origin["example"], made)
    kept = [e for e in examples if e.id in pairs][: recipe.probes.records]
    requests = [Request(id=e.id, image=e.image, prompt=e.prompt) for e in kept]
    answers = generate(
        context.vlm, requests, Decoding(), batch_size=recipe.eval.batch_size, desc="probe set"
    )
    records = [
        _records.ProbeRecord(
            id=example.id,
            image=example.image,
            prompt=example.prompt,
            own=own[0],
            chosen=pairs[example.id].chosen,
            rejected=pairs[example.id].rejected,
            facts=example.facts,
        )
        for example, own in zip(kept, answers, strict=True)
        if own[0]
    ]
    runfolder.add(run, data={"probe_set": _records.save(folder, records)})


def _examples(source: Any, split: str, limit: int, seed: int) -> tuple[list[Example], list[Skip]]:
    examples, skips = [], []
    for record in source.examples(split, limit, seed):
        (skips if isinstance(record, Skip) else examples).append(record)
    if not examples:
        raise StageError(
            f"the source gave no usable example of split {split!r}"
            + (f"; the first fault: {skips[0].detail}" if skips else "")
        )
    return examples, skips


def _evaluated(
    recipe: Recipe, run: Path, label: str, weights: Path | None, words: Any
) -> dict[str, Any]:
    from mlalign.benchmarks import evaluate as ev
    from mlalign.models.loading import load_vlm

    done = run / "eval" / f"{label}.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    if weights is None or weights.name == "adapter":
        vlm = load_vlm(recipe.model, adapter=weights, device="auto")
    else:
        vlm = load_vlm(recipe.model.model_copy(update={"path": str(weights)}), device="auto")
    examples = store.read_examples(run / "data" / "heldout")
    console.print(f"  evaluating {label} on {min(len(examples), recipe.eval.images)} images")
    result = ev.evaluate(
        vlm, examples, recipe.eval, words, label=label, folder=run, seed=recipe.seed
    )
    store.write_json_atomic(done, result)
    return result


def _follow(command: list[str], env: dict[str, str], log: Any) -> int:
    """Run the launcher; its output goes to the log, its progress bar to the terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    process = subprocess.Popen(
        command,
        env={**env, "MLALIGN_PROGRESS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    )
    assert process.stdout is not None
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[last]}"))
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task("starting", total=None, last="")
            for line in process.stdout:
                log.write(line)
                log.flush()
                shown = _progress_of(line)
                if shown is not None:
                    progress.update(task, **shown)
        return process.wait()
    except BaseException:
        # An interrupt must not leave ranks behind; checkpoints are whole whenever it comes.
        process.terminate()
        process.wait()
        raise


def _progress_of(line: str) -> dict[str, Any] | None:
    """Fields of a progress line that training prints ("mlalign-progress {json}")."""
    # A bar that the trainer draws with carriage returns may stand before it on the line.
    _, mark, fields = line.partition("mlalign-progress ")
    return json.loads(fields) if mark else None
