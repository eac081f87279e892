"""A real OpenAI-compatible server, ``transformers serve`` with the built-in model, says what the
same model says here. It gives no log-probabilities, so its answers are read from the text."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mlalign.judges import Task
from mlalign.judges._faults import ServerError
from mlalign.judges.local_model import METHOD as LOCAL
from mlalign.judges.local_model import LocalModel
from mlalign.judges.server import METHOD, Server
from mlalign.microworld import world
from mlalign.microworld.questions import questions
from mlalign.microworld.scenes import make_scene
from mlalign.models.loading import load_vlm_from, resolve_path

pytestmark = pytest.mark.slow

READY_S = 180
"""Longest wait for the server, which imports transformers first."""


class Running(NamedTuple):
    """A server and the name it has for its model."""

    url: str
    model: str


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    for package in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("serve") / "microworld"
    shutil.copytree(resolve_path("builtin:microworld"), folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.with_name("log.txt")
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield Running(f"http://127.0.0.1:{port}/v1", str(folder))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(READY_S * 5):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"no server after {READY_S} s: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def local() -> LocalModel:
    return LOCAL(LOCAL.Settings(), vlm=load_vlm_from("builtin:microworld", dtype="float32"))


def server(running: Running, folder: Path, model: str = "") -> Server:
    settings = METHOD.Settings(
        base_url=running.url, model=model or running.model, cache=str(folder), concurrency=4
    )
    return METHOD(settings)


def test_the_same_verdicts(running: Running, local: LocalModel, tmp_path: Path) -> None:
    indices = range(12)
    examples = [world.example("pairs", i) for i in indices]
    asked = [
        [
            q
            for q, a in questions(make_scene("pairs", i), random.Random(i), 8)
            if a in ("Yes.", "No.")
        ]
        for i in indices
    ]
    ours = local.ask_many(examples, asked)
    theirs = server(running, tmp_path).ask_many(examples, asked)
    verdicts = [answer.verdict for row in theirs for answer in row]
    assert verdicts == [answer.verdict for row in ours for answer in row]
    assert len(verdicts) >= 20 and set(verdicts) == {True, False}
    again = server(running, tmp_path)
    assert again.ask_many(examples, asked) == theirs
    report = again.report()
    assert report["sent"] == 0 and report["read_from"] == {"text": len(verdicts)}


def test_the_same_texts(running: Running, local: LocalModel, tmp_path: Path) -> None:
    examples = [world.example("heldout", i) for i in range(4)]
    tasks = [Task(e.id, e.prompt, e.image) for e in examples]
    tasks += [Task("alone", "Is there a red pot?"), Task("text", "Describe this image in detail.")]
    ours = local.write_many(tasks, max_new_tokens=40)
    judge = server(running, tmp_path)
    assert judge.write_many(tasks, max_new_tokens=40) == ours
    assert len({w.text for w in ours[:4]}) == 4 and all(w.text for w in ours)
    report = judge.report()
    assert report["sent"] == report["answered"] == 6 and report["failures"] == {}
    assert report["without_usage"] == 0 and report["tokens_in"] > 6 * 5
    assert judge.write_many(tasks, max_new_tokens=40) == ours and judge.report()["sent"] == 6


def test_a_model_that_it_does_not_have(running: Running, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"HTTP 400.*pinned"):
        server(running, tmp_path, model="another").write_many([Task("a", "t")], max_new_tokens=2)
