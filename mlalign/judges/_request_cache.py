"""Answers that a server was paid for, on disk: one JSON line each. Standard library only.

    FOLDER/<time>-<random>.jsonl    {"key": ..., "sha256": ..., "entry": {...}}

Every process appends to a file of its own and reads those of all, so processes, also on machines
that share the folder, never write the same file and need no lock. A line goes out in one piece when
its answer is there: a killed process loses what had not come back, and nothing else. (Power loss
may take what the system had not yet written.) A line counts only if it is whole and its checksum
holds; a faulty one is named in ``damaged`` and never served, so it is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import uuid
from pathlib import Path
from typing import Any

LAYOUT = 1
"""Version of what a key is made of. Another number, and nothing kept before is found."""

_LINE = re.compile(rb'\{"key": "([0-9a-f]{64})", "sha256": "([0-9a-f]{64})", "entry": (.*)\}\n')


def request_key(body: dict[str, Any], revision: str = "") -> str:
    """Hex sha256 of a request: everything that is sent, images by their hash, in any key order.

    ``revision`` tells apart servers that give the same model name to different weights.
    """
    parts = {"layout": LAYOUT, "revision": revision, "body": body}
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class RequestCache:
    """The folder. Safe to use from several threads."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.damaged: list[str] = []
        """File and line of every entry that was refused."""
        self._places: dict[str, tuple[Path, int, int]] = {}
        self._read: dict[Path, int] = {}
        self._lines: dict[Path, int] = {}
        self._own: Path | None = None
        self._pid = 0
        self._handle = -1
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Take in what was added to the folder, by whichever process, since the last time."""
        with self._lock:
            for path in sorted(self.folder.glob("*.jsonl")):
                if path.stat().st_size > self._read.get(path, 0):
                    self._scan(path)

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry, or None where there is none that is whole."""
        with self._lock:
            place = self._places.get(key)
        if place is None:
            return None
        path, start, length = place
        try:
            with path.open("rb") as file:
                file.seek(start)
                found = _parse(file.read(length))
        except FileNotFoundError:
            found = None
        if found is not None and found[0] == key:
            return json.loads(found[1])
        with self._lock:
            if self._places.pop(key, None) is not None:
                self.damaged.append(f"{path.name}, byte {start}")
        return None

    def ready(self) -> None:
        """Open this process's file, so that a folder that cannot be written is found before a
        request is paid for. Raises OSError."""
        with self._lock:
            self._open()

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Append an entry. Raises OSError where it cannot be written."""
        content = json.dumps(entry, ensure_ascii=True).encode()
        checksum = hashlib.sha256(key.encode() + content).hexdigest()
        line = f'{{"key": "{key}", "sha256": "{checksum}", "entry": '.encode() + content + b"}\n"
        with self._lock:
            path = self._open()
            start = os.lseek(self._handle, 0, os.SEEK_END)
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._handle, line[written:])
            except BaseException:
                # What follows half a line would be lost with it.
                self.close()
                raise
            self._places[key] = (path, start, len(line))
            self._read[path] = start + len(line)
            self._lines[path] = self._lines.get(path, 0) + 1

    def close(self) -> None:
        """Close this process's file; the next answer opens another."""
        if self._own is not None and self._pid == os.getpid():
            os.close(self._handle)
        self._own = None

    def _open(self) -> Path:
        # After a fork the file is the parent's.
        if self._own is None or self._pid != os.getpid():
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}.jsonl"
            path = self.folder / name
            flags = os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY
            self._handle, self._pid, self._own = os.open(path, flags, 0o644), os.getpid(), path
        return self._own

    def _scan(self, path: Path) -> None:
        start = self._read.get(path, 0)
        number = self._lines.get(path, 0)
        with path.open("rb") as file:
            file.seek(start)
            for line in file:
                # No line end: a process is writing it, or was killed while it did.
                if not line.endswith(b"\n"):
                    break
                number += 1
                found = _parse(line)
                if found is None:
                    self.damaged.append(f"{path.name}, line {number}")
                else:
                    self._places.setdefault(found[0], (path, start, len(line)))
                start += len(line)
        self._read[path], self._lines[path] = start, number


def _parse(line: bytes) -> tuple[str, bytes] | None:
    """Key and JSON of a line whose checksum holds."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    key, checksum, content = match.groups()
    if hashlib.sha256(key + content).hexdigest().encode() != checksum:
        return None
    return key.decode(), content
