"""Images that are trained on and measured on too: by the SHA-256 of their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlalign._rows import StoreError, raw_rows
from mlalign.recipe import Recipe
from mlalign.validate.findings import Finding, fault, note
from mlalign.validate.pairs import PairsRead
from mlalign.validate.progress import late
from mlalign.validate.sources import examples


def leaks(recipe: Recipe, run: Path, reads: Iterable[PairsRead], where: str) -> list[Finding]:
    """A fault for every training pair whose image is evaluated or probed on.

    The held-out examples and the probe set of ``run`` where they are built, else what the recipe's
    sources would give for them; nothing where no pairs are there to compare with.
    """
    reads = [read for read in reads if read.images]
    findings: list[Finding] = []
    if not reads:
        return findings
    seen: dict[str, str] = {}
    for digest, name in _measured_on(recipe, run, where, findings):
        seen.setdefault(digest, name)
    for read in reads:
        for digest in read.images.keys() & seen.keys():
            for place in read.images[digest]:
                findings.append(
                    fault(
                        place.file,
                        "image",
                        f"is {seen[digest]} too",
                        "Remove the pair, or hold out other images",
                        row=place.row,
                        record=place.record,
                        kind="image: measured on too",
                    )
                )
    return sorted(findings, key=lambda found: (found.where, found.row or 0))


def _measured_on(
    recipe: Recipe, run: Path, where: str, findings: list[Finding]
) -> Iterator[tuple[str, str]]:
    """(digest, what it is) of the images of evaluation and probes."""
    data, probes, ev = recipe.data, recipe.probes, recipe.eval
    if ev.benchmarks:
        folder = run / "data" / "heldout"
        source = ev.source or data.source
        if (folder / "manifest.json").is_file():
            yield from _built_examples(folder, findings)
        elif source is not None:
            key = "eval.source" if ev.source else "data.source"
            found = examples(recipe, source, key, "heldout", ev.images, where)
            yield from _digests(found, "held-out example", ev.images, findings)
    if probes.methods:
        file = run / "probe_set" / "records.jsonl"
        source = probes.source or data.source
        if file.is_file():
            yield from _built_probes(file)
        elif source is not None:
            key = "probes.source" if probes.source else "data.source"
            # The build draws twice as many as it keeps: not each gives a pair.
            found = examples(recipe, source, key, "probe", 2 * probes.records, where)
            yield from _digests(found, "probe example", 2 * probes.records, findings)


def _digests(
    found: Iterable[Any], what: str, total: int, findings: list[Finding]
) -> Iterator[tuple[str, str]]:
    for example in late(found, f"hashing {what}s", total):
        if isinstance(example, Finding):
            findings.append(example)
        else:
            yield example.image_sha256, f"{what} {example.id}"


def _built_examples(folder: Path, findings: list[Finding]) -> Iterator[tuple[str, str]]:
    try:
        for _, row in raw_rows(folder, "examples"):
            data = (row.get("image") or {}).get("bytes")
            digest = hashlib.sha256(data).hexdigest() if data else ""
            yield digest, f"held-out example {row.get('id')} of {folder}"
    except StoreError as error:
        findings.append(note(str(folder), "file", f"{error}"))


def _built_probes(file: Path) -> Iterator[tuple[str, str]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        value = json.loads(line)
        # A probe image is named by its own digest.
        yield Path(value["image"]["path"]).stem, f"probe record {value['id']} of {file}"
