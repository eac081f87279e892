"""A chat server on the loopback interface that misbehaves as it is told."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Slow(NamedTuple):
    """An answer that comes too late."""

    seconds: float


class Until(NamedTuple):
    """An answer that waits until something is so."""

    ready: Callable[[], bool]


class Status(NamedTuple):
    """An error."""

    code: int
    headers: dict[str, str] | None = None
    body: str = '{"error": {"message": "no"}}'


class Cut(NamedTuple):
    """A connection that ends in the middle of the body."""


class Body(NamedTuple):
    """A body of HTTP 200, whatever it is."""

    text: str


def completion(text: str | None, **choice: Any) -> dict[str, Any]:
    """A chat completion of 11 tokens read and 3 written."""
    message = {"role": "assistant", "content": text, **choice.pop("message", {})}
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message, **choice}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
    }


def chat(text: str | None, **choice: Any) -> Body:
    """A well-formed answer."""
    return Body(json.dumps(completion(text, **choice)))


class FakeServer:
    """Behaviours by the text of the user's turn, one per request; then ``default`` for ever."""

    def __init__(self, default: Any = None) -> None:
        self.script: dict[str, list[Any]] = defaultdict(list)
        self.default = default or chat("Yes.")
        self.count: Counter[str] = Counter()
        """Requests by text."""
        self.arrived: dict[str, list[float]] = defaultdict(list)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self.on_request: Callable[[int], None] = lambda number: None
        """Called with the number of the request, before it is answered."""
        self._at_once = 0
        self._lock = threading.Lock()
        self.url = ""

    @property
    def total(self) -> int:
        return sum(self.count.values())

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeServer]:
        """The server, listening."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                # A client that was killed or has lost patience reads no answer.
                with contextlib.suppress(ConnectionError):
                    fake._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        text = next(part["text"] for part in content if part["type"] == "text")
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.count[text] += 1
            number = self.total
            self.arrived[text].append(time.monotonic())
            self.bodies.append(body)
            self.keys.append(handler.headers["Authorization"])
            behaviour = self.script[text].pop(0) if self.script[text] else self.default
        try:
            self.on_request(number)
        finally:
            with self._lock:
                self._at_once -= 1
        _behave(handler, behaviour)


def _behave(handler: BaseHTTPRequestHandler, behaviour: Any) -> None:
    if isinstance(behaviour, Slow):
        time.sleep(behaviour.seconds)
    if isinstance(behaviour, Until):
        for _ in range(1000):
            if behaviour.ready():
                break
            time.sleep(0.01)
    if isinstance(behaviour, Slow | Until):
        behaviour = chat("Yes.")
    code = behaviour.code if isinstance(behaviour, Status) else 200
    if isinstance(behaviour, Cut):
        text = json.dumps(completion("Yes."))
    else:
        text = behaviour.body if isinstance(behaviour, Status) else behaviour.text
    data = text.encode()
    handler.send_response(code)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    extra = behaviour.headers if isinstance(behaviour, Status) else None
    for name, value in (extra or {}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2] if isinstance(behaviour, Cut) else data)
    handler.close_connection = True
