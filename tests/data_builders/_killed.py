"""Builds in forked children that end themselves at a chosen moment. ``python -m`` it: see ``main``.

A moment is a call that changes the disk (sync, rename, removal, a write into a chunk or into the
Parquet file) or a call of the builder. They are counted, and the n-th does not come to pass.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_builders import _identity, engine
from data_builders._context import BuildContext
from data_builders._pairs import CHOSEN_MENTIONS, REJECTED_MENTIONS, EqualCounts
from data_builders.povid import METHOD as POVID
from data_builders.sources.microworld import METHOD as MICROWORLD
from mlalign.objects import vocabulary
from mlalign.records import Example, Facts, ImageRef, Preference, Skip

TIMINGS = ("seconds", "records_per_second")
SMALL = 5
"""Examples of a chunk, and chunks, of the cheap build."""


class Fake:
    """Up to two pairs of an example, with counts, skips of both sorts and a cap at the end."""

    name = "fake"
    expected = frozenset({"nothing to do", "mention counts differ"})

    def __init__(self, chunk: int = 8, share: float = 0.7) -> None:
        self.chunk, self.share = chunk, share
        self.seen: Counter[str] = Counter()
        self.called: list[str] = []
        self.moment: Callable[[], None] = lambda: None

    def build_many(self, chunk):
        self.called += [e.id for e in chunk]
        for number, example in enumerate(chunk):
            if number == 2:
                self.moment()
            rng = random.Random(example.id)
            made = rng.choice((0, 1, 1, 2))
            self.seen["pairs"] += made
            if made == 0:
                yield Skip(id=example.id, reason="nothing to do")
            for k in range(made):
                sides = {CHOSEN_MENTIONS: 2.0, REJECTED_MENTIONS: 2.0 + (rng.random() < 0.5)}
                yield Preference(
                    id=f"fake-{example.id}-{k}",
                    image=example.image,
                    image_sha256=example.image_sha256,
                    prompt=example.prompt,
                    chosen=f"Yes, {rng.random()}.",
                    rejected="No.",
                    scores=sides,
                )

    def finish(self, candidates):
        yield from map(EqualCounts(self.share, candidates).admit, candidates)

    def report(self, seen):
        return {"seen": dict(seen)}


def records(count: int, size: int, start: int = 0) -> Iterator[Example | Skip]:
    """Examples with images of ``size`` random bytes; every eleventh record is faulty."""
    for number in range(start, count):
        if number % 11 == 10:
            yield Skip(id=f"bad{number}", reason="image is truncated")
            continue
        data = random.Random(number).randbytes(size)
        yield Example(
            id=f"r{number}",
            image=ImageRef(data=data, path=f"there/{number}.png"),
            image_sha256=hashlib.sha256(data).hexdigest(),
            prompt="Is it?",
            facts=Facts(),
            source="fake",
        )


def make(which: str) -> tuple[Any, Any]:
    """(builder, examples): a cheap one, or the real povid on the microworld."""
    if which == "fake":
        return Fake(chunk=SMALL), partial(records, 5 * SMALL, 500)
    context = BuildContext(vocabulary=vocabulary("microworld"), language="microworld", seed=3)
    source = MICROWORLD(MICROWORLD.Settings())
    return POVID(POVID.Settings(chunk=5), context), partial(source.examples, "train", 32, 3)


def build(which: str, out: Path) -> list[str]:
    """Build into ``out``; returns the ids that the builder was given."""
    builder, examples = make(which)
    engine.build(builder, examples, out_folder=out, max_skipped=0.2, about={"seed": 3})
    return getattr(builder, "called", [])


def state(out: Path) -> dict[str, Any]:
    """What a build left: the bytes' hash, the manifest without timings, and what lies beside it."""
    manifest = json.loads((out / "manifest.json").read_text())
    return {
        "sha256": hashlib.sha256((out / "pairs.parquet").read_bytes()).hexdigest(),
        "manifest": {k: v for k, v in manifest.items() if k not in TIMINGS},
        "beside": sorted(p.name for p in out.parent.iterdir()),
        "inside": sorted(p.name for p in out.iterdir()),
    }


def arm(last: int, sent: int | None) -> list[str]:
    """Count moments from here on; at number ``last`` send this process the signal ``sent``."""
    passed: list[str] = []

    def before(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args, **keys):
            moment(name)
            return real(*args, **keys)

        setattr(owner, name, counted)

    def moment(name: str) -> None:
        passed.append(name)
        if len(passed) == last and sent is not None:
            os.kill(os.getpid(), sent)

    for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
        before(os, name)
    before(zipfile.ZipFile, "writestr")
    before(pq.ParquetWriter, "write_table")
    real = Fake.build_many

    def build_many(self, chunk):
        self.moment = partial(moment, "build_many")
        return real(self, chunk)

    Fake.build_many = build_many
    return passed


def forked(work: Callable[[], Any]) -> tuple[int, Any]:
    """(signal or 0 for none, what ``work`` returned) of a child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            os.write(writing, json.dumps(work()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), json.loads(told or "null")


def trial(which: str, folder: Path, moments: list[int], sent: int) -> dict[str, Any]:
    """Stop a build at each of the moments, one start after another, then let it end."""
    out = folder / "out"
    partial_folder = engine.partial_of(out)
    starts, stopped = [], []

    def one(last: int) -> list[str]:
        passed = arm(last, sent)
        build(which, out)
        return passed

    for last in moments:
        stopped.append(forked(partial(one, last)))
        starts.append(len(list(partial_folder.glob("chunk-*.zip"))))
    taken = (partial_folder / "journal.json").is_file()
    _, called = forked(partial(build, which, out))
    return {
        "signals": [number for number, _ in stopped],
        "finished_chunks": starts,
        "journal": taken,
        "called": called,
        **state(out),
    }


def number_of(text: str, passed: list[str]) -> int:
    """The moment that "5%" or "rename" stands for."""
    share = text.removesuffix("%")
    return passed.index(text) + 1 if share == text else max(1, int(share) * len(passed) // 100)


def main(which: str, folder: Path, sent: int, chosen: str) -> None:
    """Print, as JSON lines, an undisturbed build, its moments, and a trial for each of ``chosen``:
    "all", or lists such as "5%,9%;rename" (one trial that is stopped at 5 % of the moments, and
    its next start at 9 % of them; another at the first rename that is not a replacement)."""
    # A source file that is edited while the trials run would end them.
    code = _identity._code(Fake())
    _identity._code = lambda builder: code
    reference = folder / "reference" / "out"
    build(which, reference)
    (folder / "count").mkdir()
    _, passed = forked(lambda: [arm(0, None), build(which, folder / "count" / "out")][0])
    print(json.dumps({"moments": passed, **state(reference)}))
    plans = (
        [[n + 1] for n in range(len(passed))]
        if chosen == "all"
        else [[number_of(each, passed) for each in plan.split(",")] for plan in chosen.split(";")]
    )
    for number, plan in enumerate(plans):
        place = folder / f"trial{number}"
        place.mkdir()
        print(json.dumps({"plan": plan, **trial(which, place, plan, sent)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), signal.Signals[sys.argv[3]], sys.argv[4])
