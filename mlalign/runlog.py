"""The run folder's logs: metrics, pairs and probe readings, appended as training goes.

Lines are JSON, one event each, flushed at once, so that a killed run keeps all but its last line.
After a resume, what was logged past the checkpoint is dropped first: no step stands twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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

    def event(self, arm: str, what: str, **details: Any) -> None:
        """Append something that happened (a skip, a resume, a failed probe) to events.jsonl."""
        self._append("events.jsonl", [{"arm": arm, "time": time.time(), "event": what, **details}])

    def probe(self, arm: str, step: int, probe: str, readings: Iterable[Any]) -> None:
        """Write one probe's readings of one pass to probes/<arm>/<probe>-<step>.parquet.

        ``readings``: ``ProbeReading`` values, or plain rows for other tables.
        """
        rows = [_row(reading) for reading in readings]
        if not self.enabled or not rows:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = self.folder / "probes" / arm
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{probe}-{step}.parquet"
        aside = target.with_name(target.name + ".tmp")
        pq.write_table(pa.Table.from_pylist([{"arm": arm, **row} for row in rows]), aside)
        aside.replace(target)

    def rewind(self, arm: str, step: int) -> None:
        """Drop what was logged for ``arm`` after ``step``: a resumed run writes it again."""
        for name in ("metrics.jsonl", "pairs.jsonl"):
            path = self.folder / name
            if not self.enabled or not path.is_file():
                continue
            kept = [
                line
                for line in path.read_text(encoding="utf-8").splitlines()
                if not _is_later(line, arm, step)
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


def _row(reading: Any) -> dict[str, Any]:
    if isinstance(reading, Mapping):
        return dict(reading)
    return dataclasses.asdict(reading)


def _is_later(line: str, arm: str, step: int) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return True  # cut short by a kill
    return row.get("arm") == arm and int(row.get("step", 0)) > step


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
