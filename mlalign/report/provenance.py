"""Section: what the run was made of: versions, seed, revision, fingerprints, the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from markupsafe import Markup

from mlalign.report import figures as fg
from mlalign.report.folder import Run
from mlalign.report.section import Section, render


def section(run: Run, figures: fg.Figures) -> Section:
    """manifest.json as a table, fingerprints of the data, the resolved recipe."""
    rows = [[key, value] for key, value in flat(run.manifest)]
    rows += [
        [f"data/{name} sha256", manifest["sha256"]]
        for name, manifest in run.build_manifests.items()
        if "sha256" in manifest
    ]
    html = Markup("")
    if rows:
        html += render("plain.html.j2", kind="plain", head=[], rows=rows)
    if run.recipe:
        text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
        html += Markup("<details><summary>resolved recipe</summary><pre>{}</pre></details>").format(
            text
        )
    if run.events:
        lines = "\n".join(
            " ".join(f"{k}={v}" for k, v in event.items() if k != "time") for event in run.events
        )
        html += Markup("<details><summary>{} events</summary><pre>{}</pre></details>").format(
            len(run.events), lines
        )
    empty = "" if run.manifest else "no manifest.json: versions and seeds were not recorded"
    return Section(id="provenance", title="What this run was", html=html, empty=empty)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf; short lists stay on one line."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for i, item in enumerate(value):
            yield from flat(item, f"{prefix}.{i}")
    elif isinstance(value, list):
        yield prefix, ", ".join(str(item) for item in value)
    else:
        yield prefix, "\u2013" if value is None else str(value)
