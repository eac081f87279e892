"""Per-token reference log-probs on disk, used again across epochs, sweeps and resumes.

    with ReferenceCache.open(key.folder_in(root), key, rank=rank) as cache:
        reference = cache.get(batch, digests_C)
        if reference is None:
            reference = completion_logps(model, batch)
            cache.put(batch, digests_C, reference)

A cache is a folder: ``key.json`` (what the log-probs were computed with) and Parquet shards, one
row per completion. The key is compared field by field, each shard carries its key and a checksum,
each entry the digests of its prefix, image and completion. What does not agree is refused by name;
what is not there is a miss, for the caller to compute and put. A shard is written aside, synced and
renamed, so an interrupted write leaves the cache as it was. Shards never change and stand alone:
one may be deleted, its entries are then misses. Files ``.tmp-*``, left by a kill, are never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mlalign.branching.batch import PrefixBatch, TokenLogps
from mlalign.branching.reference_key import (
    CacheError,
    CacheKey,
    InputDigest,
    StaleEntry,
    digest_ids,
)

FORMAT = "mlalign reference cache 1"
"""Stands in ``key.json``; raise the number when shards are laid out anew."""
_KEY_FILE, _ASIDE = "key.json", ".tmp-"
_SHARD = re.compile(r"shard-r\d{5,}-\d{6,}-[0-9a-f]{8}-([0-9a-f]{64})\.parquet")
_PARTS = ("prefix", "image", "completion")


_Name = tuple[str, str]
"""Record id, side."""
_Wanted = tuple[_Name, tuple[bytes, ...]]
"""Name and digests of a completion."""


class _Entry(NamedTuple):
    """Digests of _PARTS, (tokens,) float32, and the shard's name, or what sorts after them all."""

    prints: tuple[bytes, ...]
    logps: np.ndarray
    shard: str = "~"


@dataclass(eq=False)
class ReferenceCache(contextlib.AbstractContextManager):
    """Reference log-probs by record id and side, in memory as float32. Made by ``open``.

    On disk (``nbytes``) a pair of 100 + 100 tokens takes 0.83 kB, of 200 + 200 1.6 kB. Another view
    of a record's image is another side, with a name of its own in ``batch.sides_C``.
    """

    folder: Path
    key: CacheKey
    read_only: bool = False
    rank: int = 0
    flush_every: int = 1024
    """Completions that wait in memory for the next shard: what a killed process loses at most."""

    def __post_init__(self) -> None:
        # Two runs may write at once with the same rank. uuid4 leaves the seeded generators alone.
        self._writer = uuid.uuid4().hex[:8]
        self._entries: dict[_Name, _Entry] = {}
        self._pending: dict[_Name, _Entry] = {}
        self._shards: set[str] = set()
        self.nbytes = 0

    @classmethod
    def open(
        cls, folder: str | Path, key: CacheKey, *, read_only: bool = False, rank: int = 0
    ) -> ReferenceCache:
        """The cache in ``folder`` with all that was committed; a new one where there is none.

        ``read_only``: write nothing. ``rank``: of this process, for shard names. Raises CacheError
        for another key (naming each field that differs), for a folder that is no cache and for a
        damaged shard, StaleEntry where two shards disagree on a record."""
        cache = cls(Path(folder), key, read_only, rank)
        if not cache._is_there():
            if read_only:
                raise CacheError(f"{folder}: no reference cache. Open it with read_only=False")
            about = {"format": FORMAT, "key": asdict(key)}
            cache.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(cache.folder / _KEY_FILE, json.dumps(about, indent=1).encode())
            cache._is_there()
        cache.refresh()
        return cache

    def __exit__(self, *_: object) -> None:
        self.flush()

    def __len__(self) -> int:
        """Completions, those that wait for a flush included."""
        return len(self._entries)

    def __bool__(self) -> bool:
        return True  # ``if cache`` must not keep an empty one empty for ever

    def get(self, batch: PrefixBatch, digests_C: Sequence[InputDigest]) -> TokenLogps | None:
        """Log-probs (C, S), bit for bit as put, on the batch's device; None if any is missing.

        Entropy, top-1 and mean logit, which nobody reads of a reference, are zeros. ``digests_C``:
        one per completion. The answer is this process's own: where a forward pass needs all ranks
        (ZeRO-3), let them agree on hit or miss first. Raises StaleEntry, whatever else is missing.
        """
        mask_CS = batch.mask_CS.cpu().numpy()
        logps_CS = np.zeros(mask_CS.shape, dtype=np.float32)
        wanted = _wanted(batch, digests_C)
        for index, (name, prints) in enumerate(wanted):
            entry = self._entries.get(name)
            if entry is not None:
                self._compare(name, entry.prints, prints)
                logps_CS[index, mask_CS[index]] = entry.logps
        if any(name not in self._entries for name, _ in wanted):
            return None
        out_CS = torch.from_numpy(logps_CS).to(batch.mask_CS.device)
        unread_CS = torch.zeros_like(out_CS)
        return TokenLogps(
            logps_CS=out_CS,
            mask_CS=batch.mask_CS,
            entropy_CS=unread_CS,
            top1_CS=unread_CS.bool(),
            mean_logit_CS=unread_CS,
        )

    def put(self, batch: PrefixBatch, digests_C: Sequence[InputDigest], logps: TokenLogps) -> int:
        """Keep a batch's log-probs, all or none; returns how many completions were new.

        One that is there stays: computed again, it differs by noise. Raises StaleEntry as ``get``,
        FloatingPointError for a log-prob that is not finite, ValueError for another dtype or batch.
        """
        if self.read_only:
            raise CacheError(f"{self.folder}: opened to read. Open it with read_only=False")
        mask_CS = batch.mask_CS.cpu().numpy()
        same = np.array_equal(logps.mask_CS.cpu().numpy(), mask_CS)
        if not same or logps.logps_CS.dtype != torch.float32:
            raise ValueError("log-probs that are not float32, or not of this batch")
        logps_CS = logps.logps_CS.detach().cpu().numpy()
        new: dict[_Name, _Entry] = {}
        for index, (name, prints) in enumerate(_wanted(batch, digests_C)):
            values = logps_CS[index, mask_CS[index]]
            if not np.isfinite(values).all():
                raise FloatingPointError(f"record {name[0]!r}, {name[1]}: log-prob not finite")
            entry = self._entries.get(name) or new.get(name)
            if entry is None:
                new[name] = _Entry(prints, values)
            else:
                self._compare(name, entry.prints, prints)
        self._entries |= new
        self._pending |= new
        if len(self._pending) >= self.flush_every:
            self.flush()
        return len(new)

    def flush(self) -> None:
        """Commit what waits as one shard; after an error it still waits, the folder as it was.
        Raises CacheError where the folder was removed or got another key meanwhile."""
        if not self._pending:
            return
        if not self._is_there():
            raise CacheError(f"{self.folder}: removed while in use. Start again")
        data = _encode(self._pending, self.key.fingerprint())
        stem = f"shard-r{self.rank:05d}-{len(self._shards):06d}-{self._writer}"
        shard = f"{stem}-{hashlib.sha256(data).hexdigest()}.parquet"
        _write_whole(self.folder / shard, data)
        self._shards.add(shard)
        self.nbytes += len(data)
        for name, entry in self._pending.items():
            self._entries[name] = entry._replace(shard=shard)
        self._pending.clear()

    def refresh(self) -> int:
        """Read the shards that others have committed since; returns how many.

        To be called between epochs: a record may come to another rank in the next. Of an entry
        that two processes put, that of the shard whose name sorts first holds. Raises as ``open``.
        """
        found = sorted(f for f in self.folder.glob("shard-*") if f.name not in self._shards)
        for file in found:
            data = file.read_bytes()
            for name, entry in self._decode(file, data):
                held = self._entries.get(name)
                if held is not None:
                    self._compare(name, held.prints, entry.prints)
                if held is None or entry.shard < held.shard:
                    self._entries[name] = entry
                    self._pending.pop(name, None)
            self._shards.add(file.name)
            self.nbytes += len(data)
        return len(found)

    def _decode(self, file: Path, data: bytes) -> Iterator[tuple[_Name, _Entry]]:
        """Entries of a shard that is whole and of this key."""
        match = _SHARD.fullmatch(file.name)
        if match is None or hashlib.sha256(data).hexdigest() != match[1]:
            raise CacheError(
                f"{file}: the shard is damaged, its content is not that of the checksum in its "
                "name. Delete this file to have its entries computed again"
            )
        table = pq.read_table(pa.BufferReader(data))
        if (table.schema.metadata or {}).get(b"key") != self.key.fingerprint().encode():
            raise CacheError(f"{file}: written with another key than this folder's. Remove it")
        column = table["logps"].combine_chunks()
        values, stops = column.values.to_numpy(), column.offsets.to_numpy()
        rows = zip(*(table[part].to_pylist() for part in ("id", "side", *_PARTS)), strict=True)
        for (record, side, *prints), start, stop in zip(rows, stops[:-1], stops[1:], strict=True):
            yield (record, side), _Entry(tuple(prints), values[start:stop], file.name)

    def _is_there(self) -> bool:
        """Whether the folder is a cache of this key. CacheError where it is anything else."""
        listed = os.listdir(self.folder) if self.folder.exists() else []
        names = sorted(name for name in listed if not name.startswith(_ASIDE))
        if not names:
            return False
        if _KEY_FILE not in names:
            raise CacheError(
                f"{self.folder}: holds {names[0]!r} and no {_KEY_FILE}, so it is no reference "
                "cache and is left as it is. Give a new folder"
            )
        file = self.folder / _KEY_FILE
        about: Any = None
        with contextlib.suppress(ValueError):
            about = json.loads(file.read_bytes())
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise CacheError(f"{file}: not the key of a {FORMAT!r}. Give another folder")
        old, new = about.get("key") or {}, asdict(self.key)
        changed = [
            f"{name} (was {str(old.get(name))[:40]!r}, now {str(new.get(name))[:40]!r})"
            for name in new | old
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise CacheError(
                f"{self.folder}: its log-probs were computed with another {', '.join(changed)}. "
                "Give another folder, or remove this one to have all computed again"
            )
        return True

    def _compare(self, name: _Name, held: tuple[bytes, ...], given: tuple[bytes, ...]) -> None:
        changed = [part for part, a, b in zip(_PARTS, held, given, strict=True) if a != b]
        if changed:
            raise StaleEntry(
                f"record {name[0]!r}, {name[1]}: its {' and '.join(changed)} changed since the "
                f"log-probs in {self.folder} were computed. Restore the record, or remove the "
                "folder to have all computed again"
            )


def _wanted(batch: PrefixBatch, digests_C: Sequence[InputDigest]) -> list[_Wanted]:
    mask_CS, target_CS = batch.mask_CS.cpu().numpy(), batch.target_CS.cpu().numpy()
    if not len(mask_CS) == len(batch.ids_C) == len(batch.sides_C) == len(digests_C):
        raise ValueError(f"give an id, a side and a digest for each of {len(mask_CS)} completions")
    tokens_C = [digest_ids(t[m]) for t, m in zip(target_CS, mask_CS, strict=True)]
    names_C = zip(batch.ids_C, batch.sides_C, strict=True)
    return [(n, (*d, t)) for n, d, t in zip(names_C, digests_C, tokens_C, strict=True)]


def _encode(entries: dict[_Name, _Entry], key: str) -> bytes:
    """A shard: one row per completion."""
    values = list(entries.values())
    stops = np.cumsum([0, *(len(entry.logps) for entry in values)])
    columns: dict[str, Any] = {"id": [n[0] for n in entries], "side": [n[1] for n in entries]}
    for i, part in enumerate(_PARTS):
        columns[part] = pa.array([entry.prints[i] for entry in values], pa.binary(16))
    flat = pa.array(np.concatenate([entry.logps for entry in values]))
    columns["logps"] = pa.ListArray.from_arrays(pa.array(stops, pa.int32()), flat)
    sink = pa.BufferOutputStream()
    # Dictionaries of values that do not repeat would add half the size.
    repeated: Any = ["side", "prefix", "image"]
    table = pa.table(columns, metadata={"key": key})
    pq.write_table(table, sink, compression="zstd", use_dictionary=repeated)
    return sink.getvalue().to_pybytes()


def _write_whole(file: Path, data: bytes) -> None:
    """Write a file whole or not at all; it is on the disk when this returns."""
    aside = file.with_name(f"{_ASIDE}{uuid.uuid4().hex}")
    try:
        with aside.open("xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        aside.replace(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
