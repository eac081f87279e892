"""A model behind any OpenAI-compatible server: it answers yes/no questions and writes text.

Sent, for each question or task, is one chat completion: one user turn of the image and the text.
The image goes as a base64 data URL of its original bytes (shrunk, as PNG, where a side is longer
than ``max_image_side``). Neither facts, file names nor record ids are sent. A question asks for
``answer_tokens`` tokens at temperature 0 with log-probabilities: p_yes is the probability that the
first token is a spelling of yes, summed over those that the server names (its 20 likeliest at
most), p_no likewise, as in ``local_model``. Where the server gives none, the text is read strictly
and p is 1 or 0; ``report()["read_from"]`` says how often. A text is sampled with a seed of its own,
made of ``seed`` and the task's id; whether the server keeps to it is the server's affair.

Kept, in ``cache``, is every answer as it came, with the request that it belongs to (the image by
its hash), the record's id, the server and the time; never the API key. The same request is not
sent again: not in a rerun, not after a kill, not within one call. What an answer means is decided
when it is read, so other spellings, or a better parser, need no new request.

A question that gets no answer is undecided, with its ``failure``, and a task failed; both are
counted by reason, and none is ever guessed. A server that refuses a request for good stops the run:
``ServerError``; one that is down or ill, too: ``ServerDown``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mlalign.judges import UNDECIDED, Answer, Task, Written, _parse
from mlalign.judges._chat import OURS, Chat, decoding, task_seed
from mlalign.judges._client import Client, Connection, Failure, Prepared
from mlalign.judges._request_cache import RequestCache
from mlalign.records import Example

_NAMED = 3
"""Record ids named for each reason of a failure."""


class Settings(BaseModel):
    """Which server, how it is asked, and what it costs."""

    # What is refused is not repeated in the message: it may be a key.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    base_url: str
    """Address of the API, e.g. http://localhost:8000/v1."""
    model: str
    """The model's name on that server."""
    revision: str = ""
    """Any text that tells these weights from others of the same name in the cache."""
    api_key_env: str | None = None
    """Name of the environment variable with the API key; None: the server wants none."""
    cache: str = "runs/requests"
    """Folder of the answers; several runs and machines may share it."""
    concurrency: int = Field(default=8, ge=1)
    """Requests under way at once."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds without a byte from the server that end an attempt."""
    attempts: int = Field(default=5, ge=1)
    """How often a request is sent before it has failed."""
    backoff_s: float = Field(default=1.0, ge=0)
    """Wait before the second attempt, jittered, doubled before each further one."""
    max_wait_s: float = Field(default=120.0, ge=0)
    """Longest wait; a request that the server tells to wait longer has failed."""
    stop_after: int = Field(default=20, ge=1)
    """Failed requests in a row that stop the run: the server is ill, not the records."""
    max_image_side: int = Field(default=2048, ge=1)
    """Pixels; a larger image is shrunk."""
    answer_tokens: int = Field(default=1, ge=1)
    """Tokens of a yes/no answer; more than one for a server without log-probabilities whose model
    does not begin with yes or no."""
    limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name under which the server takes the most tokens of an answer."""
    omit: tuple[Literal["temperature", "top_p", "seed", "logprobs"], ...] = ()
    """Fields that the server refuses. Without a temperature it samples as it likes."""
    extra_body: dict[str, Any] = {}
    """Further fields of every request, e.g. {chat_template_kwargs: {enable_thinking: false}}."""
    yes: tuple[str, ...] = ("yes", "Yes", "YES")
    """Spellings of yes."""
    no: tuple[str, ...] = ("no", "No", "NO")
    """Spellings of no."""
    min_mass: float = Field(default=0.1, ge=0, le=1)
    """Probability that yes and no need together as the first token; below it the text is read."""
    template: str = "{question}"
    """What is asked, e.g. "{question}\\nAnswer the question using a single word or phrase."."""
    price_in: float | None = Field(default=None, ge=0)
    """Price of a million tokens read, in any currency; with price_out, the report has a cost."""
    price_out: float | None = Field(default=None, ge=0)
    """Price of a million tokens written."""

    @field_validator("base_url")
    @classmethod
    def _has_scheme(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("begin it with http:// or https://, e.g. http://localhost:8000/v1")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.isidentifier():
            raise ValueError("give the name of an environment variable, never the key itself")
        return value

    @field_validator("template")
    @classmethod
    def _has_question(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("write {question} where the question belongs")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        ours = sorted(set(self.extra_body) & set(OURS))
        if ours:
            raise ValueError(f"extra_body.{ours[0]} is set by the judge; use its own keys")
        if set(self.yes) & set(self.no) or not self.yes or not self.no:
            raise ValueError("yes and no: give each a spelling, and none to both")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in and price_out: give both or none")
        return self


class Server:
    """Judge and writer. Neither a model of ours nor a vocabulary is needed."""

    Settings = Settings

    def __init__(self, settings: Settings, *, vlm: Any = None, vocabulary: Any = None) -> None:
        self.settings = settings
        fields = {name: getattr(settings, name) for name in Connection._fields}
        self.client = Client(Connection(**fields), RequestCache(settings.cache))
        self._read_from: Counter[str] = Counter()
        self._failures: dict[str, dict[str, Any]] = {}
        self._counts: Counter[str] = Counter()

    def ask(self, example: Example, questions: Sequence[str]) -> list[Answer]:
        """One answer per question. Raises as ``ask_many`` does."""
        return self.ask_many([example], [questions])[0]

    def ask_many(
        self, examples: Sequence[Example], questions: Sequence[Sequence[str]]
    ) -> list[list[Answer]]:
        """Answers by example; all questions of all images are under way together.

        Raises RecordError for an image that cannot be read, and ServerError.
        """
        settings = self.settings
        chat = Chat(settings, decoding(settings, settings.answer_tokens, logprobs=True))
        prepared = [
            [
                chat.prepare(
                    example.id, settings.template.replace("{question}", question), example.image
                )
                for question in asked
            ]
            for example, asked in zip(examples, questions, strict=True)
        ]
        found = self.client.fetch([each for row in prepared for each in row], "asking")
        return [[self._answer(each, found[each.key]) for each in row] for row in prepared]

    def write_many(
        self,
        tasks: Sequence[Task],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Written]:
        """One result per task, in order; tasks of the same id, text and image get the same text.

        A text that ends because of ``max_new_tokens`` is given as it is, and counted. Raises
        RecordError for an image that cannot be read, and ServerError.
        """
        chat = Chat(self.settings, decoding(self.settings, max_new_tokens, temperature))
        prepared = [
            chat.prepare(
                task.id,
                task.text,
                task.image,
                # A greedy text has no seed: equal tasks are one request.
                task_seed(seed, task.id) if temperature > 0 else None,
            )
            for task in tasks
        ]
        found = self.client.fetch(prepared, "writing")
        return [self._text(each, found[each.key]) for each in prepared]

    def report(self) -> dict[str, Any]:
        """What was asked, sent, served from the cache, tried again, failed and paid, so far.

        Tokens and cost are those of the requests that this object sent and got an answer to.
        """
        counts, settings = self.client.counts, self.settings
        cost = None
        if settings.price_in is not None and settings.price_out is not None:
            paid = (
                counts["tokens_in"] * settings.price_in + counts["tokens_out"] * settings.price_out
            )
            cost = paid / 1e6
        names = ("sent", "answered", "from_cache", "tokens_in", "tokens_out", "without_usage")
        return {
            "server": settings.base_url,
            "model": settings.model,
            "questions": self._counts["questions"],
            "tasks": self._counts["tasks"],
            **{name: counts[name] for name in names},
            "cost": cost,
            "retries": dict(self.client.retries),
            "read_from": dict(self._read_from),
            "cut_short": self._counts["cut_short"],
            "failures": copy.deepcopy(self._failures),
            "cache": {
                "folder": str(self.client.cache.folder),
                "answers": len(self.client.cache),
                "damaged": list(self.client.cache.damaged),
            },
        }

    def _answer(self, request: Prepared, reply: dict[str, Any] | Failure) -> Answer:
        self._counts["questions"] += 1
        if isinstance(reply, Failure):
            return self._failed(request, reply.reason, UNDECIDED._replace(failure=reply.reason))
        settings = self.settings
        verdict = _parse.yes_or_no(reply, settings.yes, settings.no, settings.min_mass)
        if not verdict.answer.decided:
            return self._failed(request, verdict.how, UNDECIDED)
        self._read_from[verdict.how] += 1
        return verdict.answer

    def _text(self, request: Prepared, reply: dict[str, Any] | Failure) -> Written:
        self._counts["tasks"] += 1
        if isinstance(reply, Failure):
            return self._failed(request, reply.reason, Written(None, reply.reason))
        written = _parse.text_of(reply)
        if written.text is None:
            return self._failed(request, written.failure, written)
        self._counts["cut_short"] += _parse.cut_short(reply)
        return written

    def _failed(self, request: Prepared, reason: str, outcome: Any) -> Any:
        entry = self._failures.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < _NAMED:
            entry["first"].append(request.id)
        return outcome


METHOD = Server
