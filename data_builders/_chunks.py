"""Finished chunks of a build on disk: committed in order, each whole or not at all.

A chunk is one zip file: its numbers, its pairs as JSON lines, and its images, each once. It is
written aside, synced and renamed, so that a kill at any moment leaves a row of whole chunks. Beside
them ``journal.json`` says what the chunks depend on. A journal of other settings, source, seed,
model or code is refused, never mixed and never removed: it may hold hours of work.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_builders._tally import Tally
from mlalign.records import ImageRef, Preference, preference_from_json, to_json
from mlalign.store import write_json_atomic

FORMAT = 1
"""Of the chunk files."""
HEADER, LOCK, NUMBERS, PAIRS = "journal.json", "lock", "numbers.json", "pairs.jsonl"
_SHOWN = 6
"""Differing keys that a message names."""


class BuildError(ValueError):
    """A build that gave no usable pairs, or cannot go on. The message has cause and mend."""


@dataclass(frozen=True, kw_only=True)
class StoredImage(ImageRef):
    """An image inside a chunk, read when it is asked for."""

    load: Callable[[], bytes] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        """The path is the name that the image had; it need not have had one."""

    def read(self) -> bytes:
        return self.load()


class Journal:
    """The finished chunks of one build, in a folder of their own.

    Iterating gives all pairs in order, anew each time; of the images nothing is read before it is
    asked for. ``len`` is the number of finished chunks, ``tally`` their numbers.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Take the folder up, or begin it.

        ``identity``: what the chunks depend on, as JSON values. Raises BuildError where the folder
        was begun with another identity, and where another process builds into it.
        """
        self.folder = folder
        self.tally = Tally()
        self._count = 0
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            _take_lock(self._lock, folder)
            for half in folder.glob("*.tmp"):
                half.unlink()
            self._identify({"format": FORMAT, **json.loads(json.dumps(identity, default=str))})
            self._take_up()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Preference]:
        for number in range(self._count):
            for line in filter(None, self._read(number, PAIRS).decode("utf-8").split("\n")):
                yield self._pair(number, json.loads(line))

    def commit(self, tally: Tally, pairs: Sequence[Preference]) -> None:
        """Write the next chunk; on return it is on the disk. Raises OSError where it cannot be."""
        names: dict[ImageRef, str] = {}
        lines = []
        for pair in pairs:
            images = [pair.image] + ([pair.rejected_image] if pair.rejected_image else [])
            keys = [names.setdefault(image, f"image{len(names)}") for image in images]
            lines.append(json.dumps({"images": keys, "pair": to_json(pair)}, ensure_ascii=False))
        aside = self._file(self._count).with_suffix(".tmp")
        try:
            with aside.open("wb") as handle:
                with zipfile.ZipFile(handle, "w") as chunk:
                    chunk.writestr(NUMBERS, json.dumps(tally.to_json(), ensure_ascii=False))
                    chunk.writestr(PAIRS, "\n".join(lines))
                    for image, name in names.items():
                        chunk.writestr(name, image.read())
                handle.flush()
                os.fsync(handle.fileno())
            aside.replace(self._file(self._count))
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)
        self.tally.add(tally)
        self._count += 1

    def remove(self) -> None:
        """Delete the folder: its pairs are in the finished file, or of no use."""
        # Chunks without a header count for nothing, so a removal that is cut short leaves no trap.
        (self.folder / HEADER).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        if self._zip is not None:
            self._zip[1].close()
            self._zip = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _identify(self, identity: dict[str, Any]) -> None:
        header = self.folder / HEADER
        if not header.is_file():
            for rest in self.folder.glob("chunk-*.zip"):
                rest.unlink()
            write_json_atomic(header, identity)
            return
        before = json.loads(header.read_text(encoding="utf-8"))
        changed = list(_differences(before, identity))
        if changed:
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise BuildError(
                f"{self.folder} holds a build that was begun otherwise, and its pairs cannot be "
                f"mixed with those of this one. What differs (then -> now): "
                f"{'; '.join(changed[:_SHOWN])}{more}. Go back to that to finish it, or remove "
                f"{self.folder} to build anew"
            )

    def _take_up(self) -> None:
        while self._file(self._count).is_file():
            self.tally.add(Tally.from_json(json.loads(self._read(self._count, NUMBERS))))
            self._count += 1
        for file in self.folder.glob("chunk-*.zip"):
            if file >= self._file(self._count):
                file.unlink()

    def _file(self, number: int) -> Path:
        return self.folder / f"chunk-{number:08d}.zip"

    def _read(self, number: int, member: str) -> bytes:
        file = self._file(number)
        try:
            if self._zip is None or self._zip[0] != number:
                if self._zip is not None:
                    self._zip[1].close()
                    self._zip = None
                self._zip = number, zipfile.ZipFile(file)
            return self._zip[1].read(member)
        except (zipfile.BadZipFile, KeyError) as error:
            raise BuildError(
                f"{file}: damaged on the disk ({error}). Remove it and build again: its records "
                "and those after it are built anew"
            ) from error

    def _pair(self, number: int, value: dict[str, Any]) -> Preference:
        record = value["pair"]
        sides = ("image", "rejected_image")[: len(value["images"])]
        images = {
            side: StoredImage(
                path=record[side]["path"], load=functools.partial(self._read, number, name)
            )
            for side, name in zip(sides, value["images"], strict=True)
        }
        pair = preference_from_json({**record, "rejected_image": None}, images["image"])
        return replace(pair, **images) if len(images) > 1 else pair


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, as fsync does a file's content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_lock(lock: int, folder: Path) -> None:
    """Held until it is closed or the process ends, however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BuildError(
            f"{folder}: another process is building into it. Wait for it, or end it"
        ) from error
    except OSError:
        # A file system without locks: two builds at once cannot be told there.
        return


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """ "settings.chunk: 64 -> 32" for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for each in dict.fromkeys([*before, *now]):
            where = f"{key}.{each}" if key else str(each)
            yield from _differences(before.get(each), now.get(each), where)
    elif before != now:
        yield f"{key}: {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
