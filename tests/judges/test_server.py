"""A server that misbehaves: every request is counted, nothing is scored by default."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlalign.judges import Answer
from mlalign.judges._faults import ServerDown, ServerError, retry_after
from mlalign.judges.server import METHOD, Server
from mlalign.microworld import world
from mlalign.records import Example
from tests.judges._fake_server import Body, Cut, FakeServer, Slow, Status, Until, chat

YES, NO = Answer(1.0, 0.0), Answer(0.0, 1.0)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer().running() as server:
        yield server


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [world.example("pairs", i) for i in range(2)]


def judge(fake: FakeServer, folder: Path, **settings: Any) -> Server:
    quick: dict[str, Any] = {"timeout_s": 2.0, "backoff_s": 0.01, "model": "m"}
    return METHOD(
        METHOD.Settings(base_url=fake.url, cache=str(folder), **(quick | settings)),
        vlm=None,
        vocabulary=None,
    )


TROUBLES = {
    "timeout": Slow(3.0),
    "HTTP 429": Status(429, {"Retry-After": "0.05"}),
    "HTTP 500": Status(500),
    "HTTP 503": Status(503, {"Retry-After": "0"}, "<html>busy</html>"),
    "HTTP 408": Status(408),
    "HTTP 409": Status(409),
    "connection": Cut(),
    "unreadable body": Body("<html>hello</html>"),
}


def test_each_trouble_costs_one_more_request(
    fake: FakeServer, tmp_path: Path, examples: list[Example]
) -> None:
    for cause, trouble in TROUBLES.items():
        fake.script[cause] = [trouble, chat("No.")]
    asked = [*TROUBLES, "plain"]
    server = judge(fake, tmp_path)
    assert server.ask(examples[0], asked) == [NO] * len(TROUBLES) + [YES]
    assert fake.count == {**dict.fromkeys(TROUBLES, 2), "plain": 1}
    report = server.report()
    assert report["retries"] == dict.fromkeys(TROUBLES, 1)
    assert report["sent"] == 17 and report["answered"] == 9 and report["failures"] == {}


NO_COMPLETIONS = (
    "null",
    "[]",
    '{"error": "no"}',
    '{"choices": []}',
    '{"choices": [{}]}',
    '{"choices": [{"message": {"content": 3}}]}',
    '{"choices": [{"message": {"content": "Yes."}}',
)


@pytest.mark.parametrize("text", NO_COMPLETIONS)
def test_a_body_without_a_message_is_no_answer(
    fake: FakeServer, tmp_path: Path, examples: list[Example], text: str
) -> None:
    fake.script["q"] = [Body(text), chat("No.")]
    assert judge(fake, tmp_path).ask(examples[0], ["q"]) == [NO]
    assert fake.count["q"] == 2


@pytest.mark.parametrize("cause", TROUBLES)
def test_after_the_last_attempt_nothing_is_scored(
    fake: FakeServer, tmp_path: Path, examples: list[Example], cause: str
) -> None:
    fake.script["q"] = [TROUBLES[cause]] * 2
    server = judge(fake, tmp_path, attempts=2)
    (answer,) = server.ask(examples[0], ["q"])
    assert not answer.decided and answer.verdict is None and math.isnan(answer.p_no)
    reason = f"no answer after 2 attempts ({cause})"
    assert answer.failure == reason
    failed = {"count": 1, "first": [examples[0].id]}
    assert server.report()["failures"] == {reason: failed}
    assert fake.count["q"] == 2
    # A failure is not kept: a rerun asks again, and only for what failed.
    server.ask(examples[0], ["q", "other"])
    assert fake.count == {"q": 3, "other": 1}


def test_an_answer_that_is_neither_is_undecided_and_paid_once(
    fake: FakeServer, tmp_path: Path, examples: list[Example]
) -> None:
    said = ["Maybe.", "Affirmative.", "No doubt there is", "yes or no", "", None, "Yesterday."]
    for text in said:
        fake.script[str(text)] = [chat(text)]
    asked = [str(text) for text in said]
    server = judge(fake, tmp_path)
    answers = server.ask(examples[0], asked)
    # It did answer: asked again, it would say the same.
    assert [(a.decided, a.failure) for a in answers] == [(False, "")] * len(said)
    failures = server.report()["failures"]
    assert failures["neither yes nor no"]["count"] == 5
    assert failures["empty answer"]["count"] == 2
    # What was meant is decided when the answer is read.
    wider = judge(fake, tmp_path, yes=("yes", "Yes", "Affirmative"))
    answers = wider.ask(examples[0], asked)
    assert answers[1] == YES and sum(a.decided for a in answers) == 1
    assert fake.total == len(said)


def test_a_rerun_needs_no_server(tmp_path: Path, examples: list[Example]) -> None:
    with FakeServer().running() as fake:
        fake.script["b"] = [chat("no")]
        first = judge(fake, tmp_path).ask_many(examples, [["a", "b"], ["a"]])
        fake.script["b"] = [chat("no")]
    again = judge(fake, tmp_path)
    assert again.ask_many(examples, [["a", "b"], ["a"]]) == first == [[YES, NO], [YES]]
    report = again.report()
    assert (report["sent"], report["from_cache"], report["tokens_in"]) == (0, 3, 0)


def test_equal_questions_are_one_request(
    fake: FakeServer, tmp_path: Path, examples: list[Example]
) -> None:
    server = judge(fake, tmp_path)
    assert server.ask_many([*examples, examples[0]], [["a", "a"], ["a"], ["a"]]) == [
        [YES, YES],
        [YES],
        [YES],
    ]
    assert fake.count["a"] == 2
    assert server.report()["from_cache"] == 2 and server.report()["questions"] == 4
    assert server.ask(examples[0], []) == [] and server.ask_many([], []) == []


@pytest.mark.parametrize(
    ("status", "mend"),
    [
        (Status(400), "judge.omit"),
        (Status(401, body="wrong key sekret-1"), "judge.api_key_env"),
        (Status(403), "judge.api_key_env"),
        (Status(404), "judge.base_url.*judge.model"),
        (Status(413), "judge.max_image_side"),
        (Status(422), "judge.omit"),
        (Status(429, body='{"error": {"code": "insufficient_quota"}}'), "top up"),
    ],
)
def test_what_would_be_refused_again_stops_at_once(
    fake: FakeServer,
    tmp_path: Path,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    status: Status,
    mend: str,
) -> None:
    monkeypatch.setenv("SOME_KEY", "sekret-1")
    fake.script["b"] = [status]
    server = judge(fake, tmp_path, concurrency=1, api_key_env="SOME_KEY")
    with pytest.raises(ServerError, match=f"microworld-pairs-0.*HTTP {status.code}.*{mend}") as e:
        server.ask(examples[0], ["a", "b", "c", "d"])
    assert "sekret-1" not in str(e.value) and not isinstance(e.value, ServerDown)
    # The first answer is kept; at most one question was under way when the run stopped.
    assert fake.count["a"] == fake.count["b"] == 1 and fake.total <= 3
    judge(fake, tmp_path, api_key_env="SOME_KEY").ask(examples[0], ["a", "b", "c", "d"])
    assert fake.count == {"a": 1, "b": 2, "c": 1, "d": 1}


def test_retry_after_is_honoured(fake: FakeServer, tmp_path: Path, examples: list[Example]) -> None:
    fake.script["q"] = [Status(429, {"Retry-After": "0.4"})]
    server = judge(fake, tmp_path, backoff_s=0)
    assert server.ask(examples[0], ["q"]) == [YES]
    first, second = fake.arrived["q"]
    assert second - first >= 0.4


def test_one_that_is_sent_away_holds_the_others_back(
    fake: FakeServer, tmp_path: Path, examples: list[Example]
) -> None:
    server = judge(fake, tmp_path, backoff_s=0, concurrency=2, timeout_s=20)
    fake.script["a"] = [Status(429, {"Retry-After": "0.5"})]
    fake.script["b"] = [Until(lambda: server.client.retries["HTTP 429"] == 1)]
    # c begins when b is done, while a is still waiting.
    assert server.ask(examples[0], ["a", "b", "c"]) == [YES] * 3
    assert fake.arrived["c"][0] - fake.arrived["a"][0] >= 0.5


def test_too_long_a_wait_is_a_failure(
    fake: FakeServer, tmp_path: Path, examples: list[Example]
) -> None:
    fake.script["q"] = [Status(429, {"Retry-After": "3600"})]
    server = judge(fake, tmp_path, max_wait_s=0.1)
    assert not server.ask(examples[0], ["q"])[0].decided
    assert fake.count["q"] == 1
    assert list(server.report()["failures"]) == ["HTTP 429, Retry-After over judge.max_wait_s"]


def test_retry_after_header() -> None:
    assert retry_after({}, 0.0) == 0.0
    assert retry_after({"retry-after": "2.5"}, 0.0) == 2.5
    assert retry_after({"retry-after": "-3"}, 0.0) == 0.0
    assert retry_after({"retry-after": "nan"}, 0.0) == 0.0
    assert retry_after({"retry-after": "soon"}, 0.0) == 0.0
    date = {"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}
    assert retry_after(date, 40.0) == 60.0 and retry_after(date, 200.0) == 0.0


def test_an_ill_server_stops_the_run(
    fake: FakeServer, tmp_path: Path, examples: list[Example]
) -> None:
    fake.default = Status(500)
    fake.script["fine"] = [chat("Yes.")]
    server = judge(fake, tmp_path, attempts=2, stop_after=3, concurrency=1)
    asked = ["a", "b", "fine", "c", "d", "e", "f", "g"]
    with pytest.raises(ServerDown, match=r"3 requests in a row.*HTTP 500"):
        server.ask(examples[0], asked)
    # An answer begins the count again: a, b, c, d, e failed, the last three in a row.
    assert fake.count["e"] == 2 and fake.count["g"] == 0 and fake.count["fine"] == 1


def test_no_server_there(tmp_path: Path, examples: list[Example]) -> None:
    with FakeServer().running() as fake:
        pass
    with pytest.raises(ServerDown, match=r"no server listens at http://127.*start it"):
        judge(fake, tmp_path, attempts=2).ask(examples[0], ["q"])
