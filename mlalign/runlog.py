"""The run folder's logs: metrics, pairs and probe readings, appended as training goes.

Lines are JSON, one event each, flushed at once, so that a killed run keeps all but its last line.
After a resume, what was logged past the checkpoint is dropped first: no step stands twice.

    metrics.jsonl, pairs.jsonl, events.jsonl
    probes/<arm>/<probe>-<step>.parquet            readings of one pass, all of one schema
    probes/<arm>/_tables/<table>-<step>.parquet    further tables (attention maps), each of its own
    probes/<arm>/_state/<step>.npz                 what probes carry from one pass to the next
    probes/<arm>/_failed/<probe>.txt               the traceback of a probe that raised

``pandas.read_parquet("runs/x/probes/<arm>")`` reads all of an arm's readings, and
``pandas.read_parquet("runs/x/probes")`` all of the run's: readers of Parquet folders pass over
names that begin with an underscore.

Bytes: 4.4 a reading, 2 kB an attention map of 24 x 24. For LLaVA-1.5-7B, 32 records and all probes
a pass is 193,000 readings and about 960 maps: 0.9 MB and 2 MB. The rare tier adds 20,000 readings.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlalign import store

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

READINGS = {
    "arm": "string",
    "step": "int32",
    "probe": "string",
    "metric": "string",
    "side": "string",
    "record": "string",
    "layer": "int16",
    "head": "int16",
    "neuron": "int32",
    "group": "string",
    "value": "float32",
    "noise": "float32",
    "lo": "float32",
    "hi": "float32",
    "n": "int32",
}
"""Columns of readings and their Arrow types. Fixed, whatever a pass holds, so that files of several
steps and probes are one table. float32: its 7 digits are finer than any noise floor (1e-6 of the
value at best, for a model in float32), at half of the bytes. Strings are plain in Arrow, which all
readers take, and dictionaries on disk."""
PROBES = "probes"
"""Key of the manifest: arm -> cadence of its passes, and probes that failed."""
UNREAD = {"record": "", "layer": -1, "head": -1, "neuron": -1, "group": "", "n": 1}
"""What a reading holds where it says nothing; numbers are NaN."""


class RunLog:
    """Writer of one run folder. Only the main process writes."""

    def __init__(self, folder: str | Path, *, enabled: bool = True) -> None:
        self.folder = Path(folder)
        self.enabled = enabled
        if enabled:
            self.folder.mkdir(parents=True, exist_ok=True)

    def metrics(self, arm: str, step: int, values: Mapping[str, Any]) -> None:
        """Append scalars of one step to metrics.jsonl."""
        self._append("metrics.jsonl", [{"arm": arm, "step": step, "time": time.time(), **values}])

    def pairs(self, arm: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append per-pair values (id, loss, margin, logps...) to pairs.jsonl."""
        self._append("pairs.jsonl", [{"arm": arm, "step": step, **row} for row in rows])

    def rollouts(self, arm: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append sampled completions with their rewards to rollouts.jsonl."""
        self._append("rollouts.jsonl", [{"arm": arm, "step": step, **row} for row in rows])

    def event(self, arm: str, what: str, **details: Any) -> None:
        """Append something that happened (a skip, a resume, a failed probe) to events.jsonl."""
        self._append("events.jsonl", [{"arm": arm, "time": time.time(), "event": what, **details}])

    def probe(self, arm: str, step: int, probe: str, readings: Iterable[Any]) -> None:
        """Write one table of one pass, whole or not at all.

        ``readings``: ``ProbeReading`` values (or rows with their names), which go to
        probes/<arm>/<probe>-<step>.parquet; or plain rows of a further table, which go to _tables.
        """
        rows = [_row(reading) for reading in readings]
        if not self.enabled or not rows:
            return
        folder = self.folder / "probes" / arm
        if {"metric", "value"} <= rows[0].keys() <= READINGS.keys():
            _write_parquet(folder / f"{probe}-{step}.parquet", _readings(arm, rows))
        else:
            _write_parquet(folder / "_tables" / f"{probe}-{step}.parquet", _table(arm, rows))

    def remember(self, arm: str, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep what probes carry from the pass at ``step`` to the next, whole or not at all."""
        if not self.enabled:
            return
        import numpy as np

        folder = self.folder / "probes" / arm / "_state"
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{step}.npz.tmp"
        with aside.open("wb") as handle:
            np.savez(handle, allow_pickle=False, **dict(arrays))
        aside.replace(folder / f"{step}.npz")

    def remembered_steps(self, arm: str) -> list[int]:
        """Steps whose pass left something for the next, in order."""
        folder = self.folder / "probes" / arm / "_state"
        return sorted(int(file.stem) for file in folder.glob("*.npz") if file.stem.isdigit())

    def remembered(self, arm: str, step: int) -> dict[str, np.ndarray]:
        """What ``remember`` kept at ``step``."""
        import numpy as np

        with np.load(self.folder / "probes" / arm / "_state" / f"{step}.npz") as kept:
            return {name: kept[name] for name in kept.files}

    def forget(self, arm: str, steps: Iterable[int]) -> None:
        """Remove what was remembered at these steps."""
        for step in steps if self.enabled else ():
            (self.folder / "probes" / arm / "_state" / f"{step}.npz").unlink(missing_ok=True)

    def traceback(self, arm: str, probe: str, text: str) -> Path:
        """Write down why a probe was disabled; returns probes/<arm>/_failed/<probe>.txt."""
        file = self.folder / "probes" / arm / "_failed" / f"{probe}.txt"
        if self.enabled:
            store.write_text_atomic(file, text)
        return file

    def manifest(self, key: str, arm: str) -> dict[str, Any]:
        """What the run's manifest says of an arm under ``key``; empty where it says nothing."""
        file = self.folder / "manifest.json"
        whole = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return whole.get(key, {}).get(arm, {})

    def add_to_manifest(self, key: str, arm: str, facts: Mapping[str, Any]) -> None:
        """Put ``facts`` in the place of what the run's manifest says of an arm under ``key``."""
        if not self.enabled:
            return
        file = self.folder / "manifest.json"
        whole = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        whole.setdefault(key, {})[arm] = _plain(facts)
        store.write_json_atomic(file, whole)

    def rewind(self, arm: str, step: int, until: int | None = None) -> None:
        """Drop what was logged for ``arm`` after ``step``, which will be written again; up to and
        with ``until`` where given. Events stay: they happened."""
        if not self.enabled:
            return
        folder = self.folder / "probes" / arm
        for file in [*folder.glob("*.parquet"), *folder.glob("_*/*")]:
            end = file.name.partition(".")[0].rpartition("-")[2]
            if end.isdigit() and _is_between(int(end), step, until):
                file.unlink()
        for name in ("metrics.jsonl", "pairs.jsonl", "rollouts.jsonl"):
            path = self.folder / name
            if not path.is_file():
                continue
            # A rollout bears the number of steps taken before it: that of the step itself is one
            # of those that are sampled again.
            early = 1 if name == "rollouts.jsonl" else 0
            last = until if until is None else until - early
            kept = [
                line
                for line in path.read_text(encoding="utf-8").splitlines()
                if not _is_dropped(line, arm, step - early, last)
            ]
            aside = path.with_name(path.name + ".tmp")
            aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            aside.replace(path)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if not self.enabled or not rows:
            return
        text = "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)
        with (self.folder / name).open("a", encoding="utf-8") as handle:
            handle.write(text)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; a last line cut short by a kill is left out."""
    file = Path(path)
    if not file.is_file():
        return []
    rows = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise
    return rows


def _readings(arm: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Readings under the fixed schema. Raises ValueError for a column that it has not."""
    import pyarrow as pa

    unknown = {name for row in rows for name in row} - READINGS.keys()
    if unknown:
        raise ValueError(f"a reading has no column {min(unknown)!r}; it has {', '.join(READINGS)}")
    schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in READINGS.items()])
    nothing = {name: UNREAD.get(name, math.nan) for name in READINGS}
    return pa.Table.from_pylist([{**nothing, "arm": arm, **row} for row in rows], schema)


def _table(arm: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of any columns: numbers in 4 bytes; what holds nothing but None or empty lists is
    float32, so that the files of several steps agree."""
    import pyarrow as pa

    def narrow(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_list(kind):
            return pa.list_(narrow(kind.value_type))
        if pa.types.is_floating(kind) or pa.types.is_null(kind):
            return pa.float32()
        return pa.int32() if pa.types.is_integer(kind) else kind

    made = pa.Table.from_pylist([{"arm": arm, **row} for row in rows])
    return made.cast(pa.schema([(field.name, narrow(field.type)) for field in made.schema]))


def _write_parquet(target: Path, table: pa.Table) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".tmp")
    # Dictionaries for what repeats; the bytes of a float apart, so that the high ones compress.
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    others = [name for name in table.column_names if name not in floats]
    options: dict[str, Any] = {"use_dictionary": others, "use_byte_stream_split": floats}
    pq.write_table(table, aside, compression="zstd", **options)
    aside.replace(target)


def probe_faults(folder: str | Path, arms: Iterable[str]) -> list[str]:
    """One line for each probe that was disabled while an arm of a run trained."""
    log = RunLog(folder, enabled=False)
    return [
        f"{arm}: probe {probe} failed at step {each['step']} and is left out from there on: "
        f"{each['error']} (traceback: {each['traceback']})"
        for arm in arms
        for probe, each in log.manifest(PROBES, arm).get("failed", {}).items()
    ]


def _row(reading: Any) -> dict[str, Any]:
    if isinstance(reading, Mapping):
        return dict(reading)
    return dataclasses.asdict(reading)


def _is_dropped(line: str, arm: str, after: int, until: int | None) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return True  # cut short by a kill
    return row.get("arm") == arm and _is_between(int(row.get("step", 0)), after, until)


def _is_between(step: int, after: int, until: int | None) -> bool:
    return step > after and (until is None or step <= until)


def _plain(value: Any) -> Any:
    """JSON values: numbers out of tensors and arrays; None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
