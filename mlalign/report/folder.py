"""A run folder, read: every part on demand, an absent part as empty. Nothing is computed here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mlalign import runlog, store
from mlalign.records import Example, ImageRef, Preference, Skip, facts_from_json

MAPS = "attention_maps"
"""The table of attention maps among the probe tables."""
READING = {
    name: runlog.UNREAD.get(name, math.nan)
    for name in runlog.READINGS.keys() - {"arm", "step", "probe", "metric", "side", "value"}
}
"""Columns that a table of readings may leave out, and what they then hold."""


@dataclass(frozen=True)
class ProbeTable:
    """One pass of one probe for one arm."""

    arm: str
    probe: str
    step: int
    path: Path

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the columns that the file has."""
        return frozenset(self._file.schema_arrow.names)

    @property
    def _file(self) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.path)

    @property
    def is_readings(self) -> bool:
        """Whether its rows are readings, and not maps, words or neurons."""
        return {"metric", "side", "value"} <= self.names

    def table(self, **wanted: Any) -> Any:
        """A pyarrow table of the rows whose columns have these values (or one of a list).

        A column that is not in the file counts as its default of ``READING``.
        """
        import pyarrow.compute as pc

        found = self._file.read()
        for column, value in wanted.items():
            options = list(value) if isinstance(value, (list, tuple)) else [value]
            if column in self.names:
                found = found.filter(pc.field(column).isin(options))
            elif READING.get(column) not in options:
                return found.slice(0, 0)
        return found

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """``table`` as one dict per row, what a reading leaves out filled in."""
        filled = READING if self.is_readings else {}
        return [{**filled, **row} for row in self.table(**wanted).to_pylist()]


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
        folder = self.folder / "probes"
        for path in [*folder.glob("*/*.parquet"), *folder.glob("*/_tables/*.parquet")]:
            probe, _, step = path.stem.rpartition("-")
            if probe and step.isdigit():
                arm = path.relative_to(folder).parts[0]
                tables.append(ProbeTable(arm, probe, int(step), path))
        return sorted(tables, key=lambda t: (t.arm, t.probe, t.step))

    def probe(self, name: str, *, last: bool = False, **wanted: Any) -> list[dict[str, Any]]:
        """Rows of one probe table over arms and steps, or over each arm's last step only.

        A large model gives tens of thousands of readings a pass: ask for what is needed.
        """
        tables = [t for t in self.probe_tables if t.probe == name]
        if last:
            tables = list({t.arm: t for t in tables}.values())
        return [row for t in tables for row in t.rows(**wanted)]

    @cached_property
    def reading_tables(self) -> list[ProbeTable]:
        """The tables of readings among the probe tables."""
        return [t for t in self.probe_tables if t.is_readings]

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
