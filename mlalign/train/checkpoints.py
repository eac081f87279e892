"""Checkpoints that are whole or not there: written aside, renamed, with a manifest of hashes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from mlalign.store import write_json_atomic

MANIFEST = "COMPLETE.json"
"""Present, with the hash of every file, only in a checkpoint that was written to its end."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file and the mend."""


def seal(aside: Path, target: Path, facts: dict) -> None:
    """Write the manifest into ``aside`` and rename it to ``target``. One process calls this."""
    files = {str(f.relative_to(aside)): _sha256(f) for f in sorted(aside.rglob("*")) if f.is_file()}
    write_json_atomic(aside / MANIFEST, {**facts, "files": files})
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)


def check(folder: Path, facts: dict) -> None:
    """Raise CheckpointError unless every file is there as it was written, for the same run.

    ``facts``: what must agree with the manifest (data fingerprint, number of processes...).
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, digest in manifest["files"].items():
        file = folder / name
        if not file.is_file() or _sha256(file) != digest:
            raise CheckpointError(
                f"{file}: missing or changed since the checkpoint was written. Remove {folder} to "
                "resume from the one before it"
            )
    for key, value in facts.items():
        if manifest.get(key) != value:
            raise CheckpointError(
                f"{folder}: written with {key} = {manifest.get(key)!r}, now it is {value!r}. "
                f"Restore it to resume, or remove {folder.parent} to start over"
            )


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint with a manifest; half-written ones are passed over."""
    found = [c for c in folder.glob("checkpoint-*") if (c / MANIFEST).is_file()]
    return max(found, key=lambda c: int(c.name.rpartition("-")[2]), default=None)


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` complete checkpoints, and what was left half-written."""
    complete = sorted(
        (c for c in folder.glob("checkpoint-*") if (c / MANIFEST).is_file()),
        key=lambda c: int(c.name.rpartition("-")[2]),
    )
    for old in complete[:-keep]:
        shutil.rmtree(old)
    shutil.rmtree(folder / "writing", ignore_errors=True)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
