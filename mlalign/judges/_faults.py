"""What a failed request means: try again, or stop and say what to mend."""

from __future__ import annotations

import email.utils
import socket
import time
from types import ModuleType
from typing import Any, NamedTuple

AGAIN = frozenset({408, 409, 429})
"""Client errors that pass, beside every 5xx."""
_KEY = "set the environment variable that judge.api_key_env names to a valid key"
_FIELDS = (
    "if the server knows no such field, name it in judge.omit or change judge.limit_key; if the "
    "request is too long, shorten the record or lower judge.max_image_side"
)
MENDS = {
    400: _FIELDS,
    401: _KEY,
    402: "top up the account",
    403: _KEY,
    404: "check judge.base_url (it usually ends in /v1) and judge.model",
    413: "lower judge.max_image_side",
    422: _FIELDS,
}


class ServerError(ValueError):
    """The server cannot be used as it is. The message says what to mend; nothing is lost."""


class ServerDown(ServerError):
    """It cannot be used now: nobody listens, or it is ill. Waiting may mend that."""


class Trouble(NamedTuple):
    """An attempt that may be repeated."""

    cause: str
    """Short and countable."""
    wait_s: float = 0.0
    """What the server asked to wait."""
    absent: bool = False
    """Nothing listens there."""


def openai() -> ModuleType:
    """The client's package. Raises ImportError saying how to install it."""
    try:
        import openai as package
    except ImportError as error:
        raise ImportError("judge server needs openai: pip install 'mlalign[serve]'") from error
    return package


def judge(error: Any, where: str, secret: str) -> Trouble:
    """What may be repeated; raises ServerError for what the server refuses for good.

    ``error``: of the openai client; one that it does not raise by a request is raised again.
    ``where``: the server and the record, for the message, from which ``secret`` is kept.
    """
    package = openai()
    if isinstance(error, package.APITimeoutError):
        return Trouble("timeout")
    if isinstance(error, package.APIConnectionError):
        return Trouble("connection", absent=_is_absent(error))
    if not isinstance(error, package.APIStatusError):
        raise error
    status, headers = int(error.status_code), error.response.headers
    # An empty account is answered like haste, but no wait fills it.
    unpaid = error.code == "insufficient_quota"
    if (status in AGAIN or status >= 500) and not unpaid:
        return Trouble(f"HTTP {status}", retry_after(headers, time.time()))
    said = " ".join(error.response.text.split())[:300]
    if secret:
        said = said.replace(secret, "(key)")
    mend = MENDS[402] if unpaid else MENDS.get(status, _FIELDS)
    raise ServerError(
        f"{where}: HTTP {status}, {said or 'nothing more'}. To mend it: {mend}. Answers that came "
        "back are kept; a rerun asks for the rest"
    ) from error


def retry_after(headers: Any, now: float) -> float:
    """Seconds that a Retry-After header (seconds or a date; ``now`` in Unix time) asks to wait."""
    value = headers.get("retry-after")
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return 0.0


def _is_absent(error: BaseException) -> bool:
    """Whether nothing listens at the address, or there is no such address."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError | socket.gaierror):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
