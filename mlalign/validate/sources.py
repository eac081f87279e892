"""Sources of what is not built yet: they are here, and their first records can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mlalign import methods
from mlalign.recipe import MethodRef, Recipe, RecipeError, configure
from mlalign.records import Example, Preference, Skip
from mlalign.validate.findings import Finding, fault, note, split_mend
from mlalign.validate.methods import SOURCES

FIRST = 8
"""Records that are read of a source whose pairs are not built yet."""
UNREAD = "image cannot be read"
"""Reason of a source's skip where an image's file is missing."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def open_source(ref: MethodRef, key: str) -> Any:
    """A recipe's source. Raises UnknownMethod, RecipeError, and what the source itself raises."""
    method = methods.find(SOURCES, ref.name)
    return method(configure(method, ref, key))


def of_the_hub(ref: MethodRef) -> str | None:
    """The data set that a source would fetch from the Hub; None where it reads what is here."""
    path = ref.settings().get("path")
    if not isinstance(path, str) or Path(path).expanduser().exists():
        return None
    return path if _HUB_ID.fullmatch(path) else None


def first_records(recipe: Recipe, run: Path, missing: Sequence[str], where: str) -> list[Finding]:
    """What the sources of all that ``run`` lacks give first. ``missing``: arms without pairs."""
    data, ev, probes = recipe.data, recipe.eval, recipe.probes
    findings = []
    for arm in missing:
        ref = data.pairs.get(arm)
        if isinstance(ref, MethodRef):
            findings += _look(ref, f"data.pairs.{arm}", where, recipe.seed, None)
    wanted = []
    if any(arm not in data.pairs for arm in missing):
        wanted.append(("data.source", data.source, "train"))
    if ev.benchmarks and not (run / "data" / "heldout" / "manifest.json").is_file():
        key = "eval.source" if ev.source else "data.source"
        wanted.append((key, ev.source or data.source, "heldout"))
    if probes.methods and not (run / "probe_set" / "records.jsonl").is_file():
        key = "probes.source" if probes.source else "data.source"
        wanted.append((key, probes.source or data.source, "probe"))
    for key, ref, split in wanted:
        if ref is not None:
            findings += _look(ref, key, where, recipe.seed, split)
    return findings


def examples(
    recipe: Recipe, ref: MethodRef, key: str, split: str, limit: int, where: str
) -> Iterator[Example | Finding]:
    """The usable examples of a split, or the finding that says why there are none."""
    if (name := of_the_hub(ref)) is not None:
        yield _elsewhere(where, key, name)
        return
    try:
        for record in open_source(ref, key).examples(split, limit, recipe.seed):
            if isinstance(record, Example):
                yield record
    except (methods.UnknownMethod, RecipeError):
        # Said where the methods are looked at.
        return
    except (OSError, ValueError) as error:
        yield _unreadable(ref, key, where, error)


def _look(ref: MethodRef, key: str, where: str, seed: int, split: str | None) -> list[Finding]:
    """The first examples of a split; of a source of pairs (split None), the first pairs."""
    if (name := of_the_hub(ref)) is not None:
        return [_elsewhere(where, key, name)]
    try:
        source = open_source(ref, key)
        gives = "pairs" if split is None else "examples"
        if not hasattr(source, gives):
            return [fault(where, key, f"{ref.name} gives no {gives}", "Name another source")]
        made = source.examples(split, FIRST, seed) if split else source.pairs(FIRST, seed)
        records = list(islice(made, FIRST))
    except (methods.UnknownMethod, RecipeError):
        return []
    except (OSError, ValueError) as error:
        return [_unreadable(ref, key, where, error)]
    findings = [_skipped(record, key) for record in records if isinstance(record, Skip)]
    usable = sum(isinstance(record, (Example, Preference)) for record in records)
    if not usable:
        tried = f"none of its first {len(records)} records can be used" if records else "no record"
        of = "pairs" if split is None else f"split {split!r}"
        problem = f"{ref.name}, {of}: {tried}"
        mend = "Check its settings and files"
        # Released sets often leave their images to be fetched elsewhere.
        absent = {getattr(record, "reason", "") for record in records} == {UNREAD}
        findings.append(fault(where, key, problem, mend, absent=absent))
    return findings


def _skipped(skip: Skip, key: str) -> Finding:
    """What the build would count: a note, since data.max_skipped says how much is too much."""
    place, found, rest = skip.detail.partition(": record ")
    file, _, row = place.rpartition(":")
    named = bool(found) and row.isdigit()
    message = f"record {rest}" if named else skip.detail or skip.reason
    return note(
        file if named else key,
        key,
        f"the build would skip it: {message}",
        row=int(row) if named else None,
        record=skip.id,
        kind=f"skipped: {skip.reason}",
    )


def _elsewhere(where: str, key: str, name: str) -> Finding:
    return note(
        where,
        key,
        f"{name} is not on this machine: `mlalign build` fetches it from the Hub, if it is there",
        "Where it is a folder, it does not exist",
        absent=True,
    )


def _unreadable(ref: MethodRef, key: str, where: str, error: Exception) -> Finding:
    """A source that cannot be opened; absent where a path in its settings does not exist."""
    paths = [value for value in ref.settings().values() if isinstance(value, str)]
    absent = any(p in str(error) and not Path(p).expanduser().exists() for p in paths)
    return fault(where, key, *split_mend(str(error)), absent=absent)
