"""What goes to the server, what is kept, and what an interrupt loses."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from mlalign.images import to_png
from mlalign.judges import Task, Written
from mlalign.judges._faults import ServerError
from mlalign.judges.server import METHOD, Server
from mlalign.microworld import world
from mlalign.records import Example, Facts, ImageRef, RecordError
from tests._syntax import REPOSITORY
from tests.judges._fake_server import FakeServer, Status, chat


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer().running() as server:
        yield server


def judge(fake: FakeServer, folder: Path, **settings: Any) -> Server:
    quick: dict[str, Any] = {"timeout_s": 5, "backoff_s": 0.01, "model": "m"}
    return METHOD(METHOD.Settings(base_url=fake.url, cache=str(folder), **(quick | settings)))


def example(picture: ImageRef, name: str = "secret-record-name") -> Example:
    facts = Facts(captions=("A secret caption.",))
    return Example(id=name, image=picture, image_sha256="", prompt="?", facts=facts, source="test")


def picture(form: str, size: tuple[int, int] = (64, 48)) -> ImageRef:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, format=form)
    return ImageRef(path=f"secret-file.{form.lower()}", data=buffer.getvalue())


def image_sent(body: dict[str, Any]) -> tuple[str, bytes]:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    kind, _, data = url.partition(";base64,")
    return kind, base64.b64decode(data)


def kept(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("*.jsonl"))


def test_what_is_sent_and_what_is_kept(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sekret-1")
    ref = picture("JPEG")
    template = "{question} Answer yes or no."
    judge(fake, tmp_path, api_key_env="SOME_KEY", template=template).ask(example(ref), ["Is {it}?"])
    (body,) = fake.bodies
    assert image_sent(body) == ("data:image/jpeg", ref.data)
    assert body.pop("messages")[0]["content"][1:] == [
        {"type": "text", "text": "Is {it}? Answer yes or no."}
    ]
    assert body == {
        "model": "m",
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert fake.keys == ["Bearer sekret-1"]
    assert "secret" not in json.dumps(fake.bodies)
    (line,) = kept(tmp_path).splitlines()
    entry = json.loads(line)["entry"]
    assert entry["record"] == "secret-record-name" and entry["server"] == fake.url
    assert entry["response"]["choices"][0]["message"]["content"] == "Yes."
    content = entry["request"]["messages"][0]["content"]
    assert content[0]["image_url"] == {"sha256": ref.sha256()}
    assert "sekret-1" not in line and "base64" not in line


def test_fields_a_server_refuses_are_left_out(fake: FakeServer, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "omit": ("temperature", "logprobs", "seed"),
        "limit_key": "max_completion_tokens",
        "extra_body": {"reasoning_effort": "low"},
    }
    server = judge(fake, tmp_path, **settings)
    server.ask(example(picture("PNG")), ["q"])
    server.write_many([Task("a", "t")], max_new_tokens=7, temperature=0.5)
    fields = [{k: v for k, v in b.items() if k != "messages"} for b in fake.bodies]
    common = {"model": "m", "reasoning_effort": "low"}
    assert fields == [
        {**common, "max_completion_tokens": 1},
        {**common, "max_completion_tokens": 7, "top_p": 1.0},
    ]
    # Two samples of one text are two requests also where the seed is not sent.
    server.write_many([Task("b", "t")], max_new_tokens=7, temperature=0.5)
    assert fake.count["t"] == 2


def test_large_and_foreign_images(fake: FakeServer, tmp_path: Path) -> None:
    server = judge(fake, tmp_path, max_image_side=40)
    server.ask(example(picture("JPEG")), ["q"])
    server.ask(example(picture("BMP", (30, 20))), ["q"])
    server.ask(example(picture("WEBP", (40, 40))), ["q"])
    (kind, shrunk), (other, png), (webp, _) = (image_sent(body) for body in fake.bodies)
    assert (kind, other, webp) == ("data:image/png", "data:image/png", "data:image/webp")
    assert Image.open(io.BytesIO(shrunk)).size == (40, 30)
    assert Image.open(io.BytesIO(png)).size == (30, 20)
    # Shrunk to another size it is another request; two sides that shrink nothing are one.
    same = picture("JPEG")
    for side in (40, 40, 50, 64, 99):
        judge(fake, tmp_path, max_image_side=side).ask(example(same), ["w"])
    assert fake.count["w"] == 3


def test_a_bad_image_is_named_and_not_paid_for(fake: FakeServer, tmp_path: Path) -> None:
    whole = to_png(Image.effect_noise((64, 64), 50).convert("RGB"))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("cut.png", "absent.png"):
        bad = example(ImageRef(path=str(tmp_path / name)), "broken-7")
        with pytest.raises(RecordError, match=rf"broken-7.*{name}"):
            judge(fake, tmp_path).ask(bad, ["q"])
    assert fake.total == 0


def test_never_more_at_once_than_allowed(fake: FakeServer, tmp_path: Path) -> None:
    # Only three requests that are there together get past it.
    together = threading.Barrier(3, timeout=10)
    fake.on_request = lambda number: void(together.wait())
    tasks = [Task(str(i), f"task {i}") for i in range(12)]
    texts = judge(fake, tmp_path, concurrency=3).write_many(tasks, max_new_tokens=4)
    assert texts == [Written("Yes.")] * 12
    assert fake.most_at_once == 3 and fake.total == 12


def void(_: Any) -> None:
    return None


def test_written_in_order_with_failures_by_reason(fake: FakeServer, tmp_path: Path) -> None:
    fake.script = {
        "one": [chat(" First. ")],
        "two": [chat("cut", finish_reason="length")],
        "three": [chat("", message={"refusal": "I will not."})],
        "four": [chat("bad", finish_reason="content_filter")],
        "five": [chat(None)],
        "six": [Status(500)] * 2,
    }
    server = judge(fake, tmp_path, attempts=2, price_in=2.0, price_out=10.0)
    tasks = [Task(f"id-{text}", text, picture("PNG")) for text in fake.script]
    written = server.write_many(tasks, max_new_tokens=9)
    failed = "no answer after 2 attempts (HTTP 500)"
    assert written == [
        Written("First."),
        Written("cut"),
        Written(None, "refused by the model"),
        Written(None, "the server's content filter"),
        Written(None, "empty answer"),
        Written(None, failed),
    ]
    report = server.report()
    assert report["failures"][failed] == {"count": 1, "first": ["id-six"]}
    assert len(report["failures"]) == 4 and report["cut_short"] == 1 and report["tasks"] == 6
    assert (report["tokens_in"], report["tokens_out"]) == (55, 15)
    assert report["cost"] == pytest.approx((55 * 2 + 15 * 10) / 1e6)
    assert judge(fake, tmp_path).report()["cost"] is None


def test_seeds_follow_the_task(fake: FakeServer, tmp_path: Path) -> None:
    tasks = [Task("a", "same"), Task("b", "same"), Task("a", "same")]
    server = judge(fake, tmp_path)
    server.write_many(tasks, max_new_tokens=4)
    assert fake.count["same"] == 1 and "seed" not in fake.bodies[0]
    server.write_many(tasks, max_new_tokens=4, temperature=0.7, seed=3)
    seeds = {body["seed"] for body in fake.bodies[1:]}
    assert len(seeds) == 2 and fake.count["same"] == 3
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert {(b["temperature"], b["top_p"]) for b in fake.bodies[1:]} == {(0.7, 1.0)}
    judge(fake, tmp_path).write_many(tasks[::-1], max_new_tokens=4, temperature=0.7, seed=3)
    assert fake.count["same"] == 3
    server.write_many(tasks, max_new_tokens=4, temperature=0.7, seed=4)
    assert fake.count["same"] == 5


def test_an_interrupt_pays_for_nothing_twice(fake: FakeServer, tmp_path: Path) -> None:
    tasks = [Task(str(i), f"task {i}") for i in range(40)]

    def interrupt(number: int) -> None:
        if number == 11:
            os.kill(os.getpid(), signal.SIGINT)

    fake.on_request = interrupt
    with pytest.raises(KeyboardInterrupt):
        judge(fake, tmp_path, concurrency=4).write_many(tasks, max_new_tokens=4)
    before = fake.total
    assert 11 <= before < 40
    texts = judge(fake, tmp_path, concurrency=4).write_many(tasks, max_new_tokens=4)
    assert texts == [Written("Yes.")] * 40
    assert set(fake.count.values()) == {1} and fake.total == 40


KILLED = """
import sys
from mlalign.judges import Task
from mlalign.judges.server import METHOD
settings = METHOD.Settings(base_url=sys.argv[1], model="m", cache=sys.argv[2], concurrency=4)
METHOD(settings).write_many([Task(str(i), f"task {i}") for i in range(40)], max_new_tokens=4)
"""


def test_a_kill_loses_only_what_had_not_come_back(fake: FakeServer, tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        if number >= 20:
            reached.set()
            go_on.wait(30)

    fake.on_request = hold
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, fake.url, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    try:
        assert reached.wait(60)
    finally:
        process.kill()
        process.wait()
    go_on.set()
    fake.on_request = lambda number: None
    came_back = {json.loads(line)["entry"]["record"] for line in kept(tmp_path).splitlines()}
    # Of 20 requests at least, up to four had no answer yet.
    assert len(came_back) >= fake.total - 4 >= 16
    texts = judge(fake, tmp_path).write_many(
        [Task(str(i), f"task {i}") for i in range(40)], max_new_tokens=4
    )
    assert texts == [Written("Yes.")] * 40
    assert {fake.count[f"task {i}"] for i in came_back} == {1}
    assert sum(n - 1 for n in fake.count.values()) <= 4


def test_a_folder_that_cannot_be_written_is_found_first(fake: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        judge(fake, tmp_path / "file").write_many([Task("a", "t")], max_new_tokens=4)
    assert fake.total == 0


def test_a_missing_key_is_named(fake: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="NO_SUCH_KEY is not set"):
        judge(fake, tmp_path, api_key_env="NO_SUCH_KEY").ask(
            world.example("pairs", 0), ["Is there a pot?"]
        )
    assert fake.total == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_key_env": "sk-sekret-1"}, "never the key itself"),
        ({"base_url": "localhost:8000"}, "begin it with http"),
        ({"template": "Say yes."}, "write {question}"),
        ({"extra_body": {"temperature": 1}}, "set by the judge"),
        ({"yes": ("no",)}, "none to both"),
        ({"price_in": 1.0}, "give both or none"),
        ({"basr_url": "http://x"}, "basr_url"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as error:
        METHOD.Settings.model_validate({"base_url": "http://x/v1", "model": "m"} | settings)
    assert "sekret" not in str(error.value)
