"""The bodies of chat requests: as they are sent, and as they are kept and known again."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

from mlalign.judges._client import Prepared
from mlalign.judges._pictures import data_url, image_key
from mlalign.judges._request_cache import request_key
from mlalign.records import ImageRef

LIKELIEST = 20
"""First tokens asked for with their log-probability: the most that the OpenAI API gives."""

OURS = frozenset(
    {
        "model",
        "messages",
        "temperature",
        "top_p",
        "seed",
        "logprobs",
        "top_logprobs",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "stream",
    }
)
"""Fields that no ``extra_body`` may set."""


class Asking(Protocol):
    """The part of the settings that a request is made of; see ``server.Settings``."""

    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def max_image_side(self) -> int: ...
    @property
    def limit_key(self) -> str: ...
    @property
    def omit(self) -> tuple[str, ...]: ...
    @property
    def extra_body(self) -> dict[str, Any]: ...


def decoding(
    settings: Asking, tokens: int, temperature: float = 0.0, *, logprobs: bool = False
) -> dict[str, Any]:
    """The fields that say how text is drawn, but for the seed."""
    fields: dict[str, Any] = {settings.limit_key: tokens, "temperature": temperature}
    if temperature > 0:
        # A server's own default may be less.
        fields["top_p"] = 1.0
    if logprobs and "logprobs" not in settings.omit:
        fields |= {"logprobs": True, "top_logprobs": LIKELIEST}
    kept = {key: value for key, value in fields.items() if key not in settings.omit}
    return kept | settings.extra_body


class Chat:
    """Requests that are drawn alike. Images are hashed once."""

    def __init__(self, settings: Asking, fields: dict[str, Any]) -> None:
        self.settings = settings
        self.fields = fields
        self._pictures: dict[ImageRef, dict[str, Any]] = {}

    def prepare(
        self, record: str, text: str, image: ImageRef | None, seed: int | None = None
    ) -> Prepared:
        """One request: a user turn of the image and the text.

        ``seed`` stands in the key also where ``omit`` keeps it from the server: another seed is
        another text. Raises RecordError for an image that cannot be read.
        """
        settings = self.settings
        drawn = {} if seed is None else {"seed": seed}
        if image is not None and image not in self._pictures:
            self._pictures[image] = image_key(image, record, settings.max_image_side)

        def body(picture: dict[str, Any] | None) -> dict[str, Any]:
            content = [] if picture is None else [{"type": "image_url", "image_url": picture}]
            content.append({"type": "text", "text": text})
            messages = [{"role": "user", "content": content}]
            return {"model": settings.model, "messages": messages, **self.fields}

        def filled() -> dict[str, Any]:
            sent = {} if "seed" in settings.omit else drawn
            if image is None:
                return body(None) | sent
            return body({"url": data_url(image, record, settings.max_image_side)}) | sent

        kept = body(None if image is None else self._pictures[image]) | drawn
        return Prepared(record, request_key(kept, settings.revision), kept, filled)


def task_seed(seed: int, task_id: str) -> int:
    """31 bits from (seed, task id): what every server takes as a seed."""
    digest = hashlib.sha256(f"{seed}\x1f{task_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
