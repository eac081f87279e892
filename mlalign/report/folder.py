"""A run folder, read: every part on demand, an absent part as empty. Nothing is computed here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mlalign import runlog, store
from mlalign.records import Example, ImageRef, Preference, Skip, facts_from_json

MAPS = "attention_maps"
"""The table of attention maps among the probe tables."""


@dataclass(frozen=True)
class ProbeTable:
    """One pass of one probe for one arm."""

    arm: str
    probe: str
    step: int
    path: Path

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows whose columns have these values, by column name."""
        import pyarrow.parquet as pq

        filters = [(column, "==", value) for column, value in wanted.items()] or None
        return pq.read_table(self.path, filters=filters).to_pylist()


class NoRunFolder(FileNotFoundError):
    """There is no such run folder."""


@dataclass(eq=False)
class Run:
    """The parts of ``folder``. Raises NoRunFolder where there is no such folder."""

    folder: Path
    unreadable: list[str] = field(default_factory=list)
    """What was there and could not be read, one line each."""

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if not self.folder.is_dir():
            raise NoRunFolder(f"no run folder {self.folder}: give runs/<name>")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json, or empty."""
        return self._json("summary.json")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """manifest.json, or empty."""
        return self._json("manifest.json")

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """recipe.yaml as plain values, or empty."""
        file = self.folder / "recipe.yaml"
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return runlog.read_lines(self.folder / "metrics.jsonl")

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """The lines of pairs.jsonl."""
        return runlog.read_lines(self.folder / "pairs.jsonl")

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl."""
        return runlog.read_lines(self.folder / "events.jsonl")

    @cached_property
    def arms(self) -> list[str]:
        """What was trained, in the recipe's order, then whatever else left a trace."""
        data = self.recipe.get("data") or {}
        named = [b["name"] if isinstance(b, dict) else b for b in data.get("builders") or ()]
        named += list(data.get("pairs") or ())
        found = list(self.summary.get("builders", {}))
        found += [row["arm"] for row in self.metrics if row.get("arm")]
        found += [table.arm for table in self.probe_tables]
        return list(dict.fromkeys(named + found))

    @cached_property
    def probe_tables(self) -> list[ProbeTable]:
        """Every probe table, by arm, probe and step."""
        tables = []
        for path in (self.folder / "probes").glob("*/*.parquet"):
            probe, _, step = path.stem.rpartition("-")
            if probe and step.isdigit():
                tables.append(ProbeTable(path.parent.name, probe, int(step), path))
        return sorted(tables, key=lambda t: (t.arm, t.probe, t.step))

    def probe(self, name: str, *, last: bool = False, **wanted: Any) -> list[dict[str, Any]]:
        """Readings of one probe over arms and steps, or over each arm's last step only.

        A large model gives tens of thousands of readings a pass: ask for what is needed.
        """
        tables = [t for t in self.probe_tables if t.probe == name]
        if last:
            tables = list({t.arm: t for t in tables}.values())
        return [row for t in tables for row in t.rows(**wanted)]

    @cached_property
    def maps(self) -> list[dict[str, Any]]:
        """Attention maps of each arm's last pass, ``arm`` and ``step`` filled in."""
        last = {t.arm: t for t in self.probe_tables if t.probe == MAPS}
        return [{**row, "arm": t.arm, "step": t.step} for t in last.values() for row in t.rows()]

    @cached_property
    def preferences(self) -> dict[str, list[Preference]]:
        """Arm -> its pairs. Rows that cannot be read are named in ``unreadable``."""
        found: dict[str, list[Preference]] = {}
        for folder in sorted((self.folder / "data").glob("*/pairs.parquet")):
            records = list(store.read_preferences(folder.parent))
            found[folder.parent.name] = [r for r in records if isinstance(r, Preference)]
            skipped = [r for r in records if isinstance(r, Skip)]
            if skipped:
                self.unreadable.append(
                    f"{folder.parent.name}: {len(skipped)} pairs cannot be read, the first: "
                    f"{skipped[0].detail or skipped[0].reason}"
                )
        return found

    @cached_property
    def probe_set(self) -> dict[str, dict[str, Any]]:
        """Record id -> the fixed probe set's records; image and facts read."""
        folder = self.folder / "probe_set"
        found = {}
        for row in runlog.read_lines(folder / "records.jsonl"):
            image = ImageRef(path=str(folder / row["image"]["path"]))
            found[row["id"]] = {**row, "image": image, "facts": facts_from_json(row["facts"])}
        return found

    @cached_property
    def build_manifests(self) -> dict[str, dict[str, Any]]:
        """Arm (or heldout) -> the manifest of its data folder."""
        return {
            file.parent.name: json.loads(file.read_text(encoding="utf-8"))
            for file in sorted((self.folder / "data").glob("*/manifest.json"))
        }

    @cached_property
    def heldout(self) -> dict[str, Example]:
        """The evaluation's examples by id."""
        folder = self.folder / "data" / "heldout"
        if not (folder / "examples.parquet").is_file():
            return {}
        return {example.id: example for example in store.read_examples(folder)}

    @cached_property
    def evals(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """(arm or "base", benchmark) -> the rows of its raw answers."""
        found = {}
        for path in sorted((self.folder / "eval").glob("*.jsonl")):
            arm, _, benchmark = path.stem.rpartition("-")
            if arm:
                found[arm, benchmark] = runlog.read_lines(path)
        return found

    def _json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
