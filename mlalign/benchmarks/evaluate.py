"""Evaluate a model: ask, store the raw answers, score the stored answers, summarise.

Scoring reads only the stored files, so it can be run again without a model (``load_scores``,
``rescore``). Files under ``<run>/eval``: ``<label>-<benchmark>.jsonl``, one raw answer per line;
``<label>-<benchmark>.meta.json``, what a figure must be read with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from mlalign import methods, store
from mlalign.benchmarks import _bootstrap, _nll
from mlalign.benchmarks._items import Benchmark, Item, Metric, Row
from mlalign.models._vlm import VLM
from mlalign.objects import Vocabulary
from mlalign.records import Example

ROOM = "mlalign.benchmarks"


class MethodRef(Protocol):
    """A recipe's reference to a method file."""

    @property
    def name(self) -> str: ...

    def settings(self) -> dict[str, Any]:
        """The method's settings."""
        ...


class Section(Protocol):
    """What is read of a recipe's ``eval`` section (``recipe.EvalSection``)."""

    @property
    def benchmarks(self) -> Sequence[MethodRef]: ...
    @property
    def images(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def bootstrap(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metrics of one label, and the images that stand behind each."""

    metrics: Mapping[str, Metric]
    image_ids: Mapping[str, tuple[str, ...]]
    """Metric -> example ids, in the order of its arrays."""


def evaluate(
    vlm: VLM,
    examples: Sequence[Example],
    section: Section,
    vocabulary: Vocabulary,
    *,
    label: str,
    folder: str | Path,
    seed: int,
) -> dict[str, Any]:
    """The flat summary of ``vlm`` on the first ``section.images`` examples.

    For each metric its value, ``<key>_ci95`` (percentile bootstrap over images) and ``<key>_n``
    (images behind it), and ``n``, the images asked. ``folder`` is the run folder; ``label`` is
    "base" or an arm. Raises ValueError where there is nothing to ask.
    """
    taken = list(examples[: section.images])
    if not taken:
        raise ValueError("eval: no example. Give a source with held-out examples")
    for ref in section.benchmarks:
        benchmark = build(ref)
        items = benchmark.items(taken, vocabulary, seed)
        answers = benchmark.answer(vlm, items, section.batch_size)
        rows = [
            {**item.to_json(), "benchmark": ref.name, "answer": answer}
            for item, answer in zip(items, answers, strict=True)
        ]
        about = {"settings": benchmark.settings.model_dump(), "vocabulary": vocabulary.name}  # type: ignore[attr-defined]
        _write(folder, label, ref.name, rows, {**about, "seed": seed, "model": vlm.name})
    rows = _nll.measure(vlm, taken, section.batch_size)
    about = {"seed": seed, "model": vlm.name, "examples_without_caption": len(taken) - len(rows)}
    _write(folder, label, _nll.NAME, rows, about)
    return rescore(folder, label, section, vocabulary, seed=seed)


def rescore(
    folder: str | Path, label: str, section: Section, vocabulary: Vocabulary, *, seed: int
) -> dict[str, Any]:
    """The summary that ``evaluate`` gives, from the stored answers alone."""
    scores = load_scores(folder, label, section, vocabulary)
    summary = _bootstrap.summarise(scores.metrics, section.bootstrap, seed)
    asked = {each for ids in scores.image_ids.values() for each in ids}
    return {**summary, "n": len(asked)}


def load_scores(folder: str | Path, label: str, section: Section, vocabulary: Vocabulary) -> Scores:
    """Score the stored answers of a label. Raises FileNotFoundError where they are not there, and
    ValueError for two benchmarks that give the same metric."""
    metrics: dict[str, Metric] = {}
    image_ids: dict[str, tuple[str, ...]] = {}
    parts: list[tuple[str, list[Row], dict[str, Metric]]] = []
    for ref in section.benchmarks:
        rows = score_file(answers_path(folder, label, ref.name), build(ref), vocabulary)
        parts.append((ref.name, rows, build(ref).metrics(rows)))
    rows = _read(answers_path(folder, label, _nll.NAME))
    parts.append((_nll.NAME, rows, _nll.metrics(rows)))
    for name, rows, found in parts:
        twice = found.keys() & metrics.keys()
        if twice:
            raise ValueError(
                f"eval.benchmarks: {name} gives {min(twice)} a second time. Name it once"
            )
        metrics |= found
        ids = tuple(dict.fromkeys(row["example_id"] for row in rows))
        image_ids |= dict.fromkeys(found, ids)
    return Scores(metrics=metrics, image_ids=image_ids)


def compare(before: Scores, after: Scores, *, resamples: int, seed: int) -> dict[str, Any]:
    """``after - before`` of every metric with ``<key>_ci95``, by a paired bootstrap over images.

    Raises ValueError where both sides do not hold the same images in the same order.
    """
    for key in before.metrics.keys() & after.metrics.keys():
        if before.image_ids[key] != after.image_ids[key]:
            raise ValueError(
                f"{key}: not the same images before and after. Evaluate both on the same"
            )
    return _bootstrap.differences(before.metrics, after.metrics, resamples, seed)


def score_file(path: str | Path, benchmark: Benchmark, vocabulary: Vocabulary) -> list[Row]:
    """Score the raw answers of one file."""
    stored = _read(Path(path))
    items = [Item.from_json(row) for row in stored]
    return benchmark.score(items, [row["answer"] for row in stored], vocabulary)


def build(ref: MethodRef) -> Benchmark:
    """The benchmark of a recipe's reference. Raises ValueError naming a key it does not take."""
    method = methods.find(ROOM, ref.name)
    try:
        return method(method.Settings(**ref.settings()))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        known = ", ".join(method.Settings.model_fields)
        raise ValueError(f"eval.benchmarks.{ref.name}: {faults}. It takes: {known}") from error


def answers_path(folder: str | Path, label: str, benchmark: str) -> Path:
    """Where the raw answers of a label lie in a run folder."""
    return Path(folder) / "eval" / f"{label}-{benchmark}.jsonl"


def _write(
    folder: str | Path, label: str, name: str, rows: Sequence[Row], about: dict[str, Any]
) -> None:
    path = answers_path(folder, label, name)
    ids = list(dict.fromkeys(row["example_id"] for row in rows))
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    store.write_text_atomic(path, "\n".join(lines) + "\n")
    store.write_json_atomic(
        path.with_suffix(".meta.json"),
        {"label": label, "benchmark": name, **about, "images": len(ids), "images_sha256": digest},
    )


def _read(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]
