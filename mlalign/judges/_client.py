"""Sends chat requests to an OpenAI-compatible server: several at once, each paid for once.

A request that the cache holds is not sent. One that fails by time, connection, HTTP 408, 409, 429
or 5xx, or with a body that is no chat completion, is tried again after a growing, jittered wait or
the server's own Retry-After, which all requests then keep. Anything else a server refuses would be
refused again: ``ServerError`` stops the run and says what to mend. Where nobody listens, or many
requests in a row fail, waiting may mend it: ``ServerDown``, a ServerError, too. What came back is
kept.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

from tqdm import tqdm

from mlalign.judges import _faults, _parse
from mlalign.judges._faults import ServerDown, ServerError, Trouble
from mlalign.judges._request_cache import RequestCache


class Prepared(NamedTuple):
    """A request, ready to be sent."""

    id: str
    """Of the record; messages name it."""
    key: str
    """In the cache."""
    body: dict[str, Any]
    """As it is kept: images by their hash."""
    fill: Callable[[], dict[str, Any]]
    """Makes the body as it is sent: images as data URLs."""


class Failure(NamedTuple):
    """A request without an answer."""

    reason: str


class Connection(NamedTuple):
    """Where to and how insistently; the fields of ``server.Settings``."""

    base_url: str
    api_key_env: str | None
    concurrency: int
    timeout_s: float
    attempts: int
    backoff_s: float
    max_wait_s: float
    stop_after: int


class Client:
    """One server and its cache. ``counts`` and ``retries`` grow over the life of the object."""

    def __init__(self, connection: Connection, cache: RequestCache) -> None:
        self.connection = connection
        self.cache = cache
        self.counts: Counter[str] = Counter()
        """sent (HTTP requests), answered, from_cache, tokens_in, tokens_out, without_usage."""
        self.retries: Counter[str] = Counter()
        """By cause."""
        self._openai: Any = None
        self._secret = ""
        self._lock = threading.Lock()
        self._not_before = 0.0
        self._in_a_row = 0

    def fetch(self, requests: Sequence[Prepared], desc: str) -> dict[str, dict[str, Any] | Failure]:
        """Response body or Failure by key.

        An interrupt or an error stops what has not been sent; what is under way is waited for and
        kept. Raises ServerError.
        """
        self.cache.refresh()
        found: dict[str, dict[str, Any] | Failure] = {}
        missing: dict[str, Prepared] = {}
        for request in requests:
            if request.key in found or request.key in missing:
                self.counts["from_cache"] += 1
                continue
            entry = self.cache.get(request.key)
            if entry is None:
                missing[request.key] = request
            else:
                self.counts["from_cache"] += 1
                found[request.key] = entry["response"]
        if missing:
            self.cache.ready()
            self._connect()
            found.update(self._send_all(list(missing.values()), desc))
        return found

    def _send_all(self, requests: list[Prepared], desc: str) -> dict[str, dict[str, Any] | Failure]:
        stop = threading.Event()
        found: dict[str, dict[str, Any] | Failure] = {}
        bar = tqdm(total=len(requests), desc=desc, unit="answer", delay=2)
        with bar, ThreadPoolExecutor(min(self.connection.concurrency, len(requests))) as pool:
            futures = {pool.submit(self._answer, request, stop): request for request in requests}
            try:
                for future in as_completed(futures):
                    found[futures[future].key] = future.result()
                    bar.update()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _answer(self, request: Prepared, stop: threading.Event) -> dict[str, Any] | Failure:
        """One request through all its attempts."""
        limits = self.connection
        filled = request.fill()
        for attempt in range(1, limits.attempts + 1):
            self._hold_back(stop)
            outcome = self._attempt(request, filled)
            if isinstance(outcome, dict):
                return outcome
            # Half to all of the doubled wait, so that those who failed together do not return
            # together.
            grown = limits.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            wait = max(min(grown, limits.max_wait_s), outcome.wait_s)
            if outcome.wait_s > limits.max_wait_s:
                return self._gave_up(f"{outcome.cause}, Retry-After over judge.max_wait_s")
            if attempt < limits.attempts:
                with self._lock:
                    self.retries[outcome.cause] += 1
                stop.wait(wait)
            elif outcome.absent:
                raise ServerDown(
                    f"no server listens at {limits.base_url}: start it, or mend judge.base_url. "
                    "Answers that came back are kept; a rerun asks for the rest"
                )
        plural = "attempt" if limits.attempts == 1 else "attempts"
        return self._gave_up(f"no answer after {limits.attempts} {plural} ({outcome.cause})")

    def _attempt(self, request: Prepared, filled: dict[str, Any]) -> dict[str, Any] | Trouble:
        with self._lock:
            self.counts["sent"] += 1
        fields = {key: value for key, value in filled.items() if key not in ("model", "messages")}
        try:
            raw = self._openai.chat.completions.with_raw_response.create(
                model=filled["model"], messages=filled["messages"], extra_body=fields
            )
        except _faults.openai().OpenAIError as error:
            where = f"{self.connection.base_url} to record {request.id!r}"
            trouble = _faults.judge(error, where, self._secret)
            held = time.monotonic() + min(trouble.wait_s, self.connection.max_wait_s)
            with self._lock:
                self._not_before = max(self._not_before, held)
            return trouble
        response = _parse.completion(raw.text)
        if response is None:
            return Trouble("unreadable body")
        self._keep(request, response)
        return response

    def _keep(self, request: Prepared, response: dict[str, Any]) -> None:
        self.cache.put(
            request.key,
            {
                "record": request.id,
                "server": self.connection.base_url,
                "received": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "request": request.body,
                "response": response,
            },
        )
        read, written = _parse.usage(response)
        with self._lock:
            self._in_a_row = 0
            self.counts["answered"] += 1
            self.counts["tokens_in"] += read or 0
            self.counts["tokens_out"] += written or 0
            self.counts["without_usage"] += read is None or written is None

    def _gave_up(self, reason: str) -> Failure:
        with self._lock:
            self._in_a_row += 1
            ill = self._in_a_row >= self.connection.stop_after
        if ill:
            raise ServerDown(
                f"{self.connection.stop_after} requests in a row failed at "
                f"{self.connection.base_url}, the last with: {reason}. See whether the server is "
                "well (judge.timeout_s, judge.attempts, judge.concurrency), and run again: "
                "answers that came back are kept"
            )
        return Failure(reason)

    def _hold_back(self, stop: threading.Event) -> None:
        """Wait while the server has asked for it. Raises _Stopped where the run is over."""
        while not stop.is_set():
            with self._lock:
                left = self._not_before - time.monotonic()
            if left <= 0:
                return
            stop.wait(left)
        raise _Stopped

    def _connect(self) -> None:
        if self._openai is not None:
            return
        openai = _faults.openai()
        name = self.connection.api_key_env
        if name is not None and not os.environ.get(name):
            raise ServerError(f"judge.api_key_env: the environment variable {name} is not set")
        self._secret = os.environ[name] if name is not None else ""
        self._openai = openai.OpenAI(
            base_url=self.connection.base_url,
            # The client insists on one; a server without keys ignores it.
            api_key=self._secret or "none",
            timeout=self.connection.timeout_s,
            max_retries=0,
        )


class _Stopped(Exception):
    """Another request has ended the run."""
