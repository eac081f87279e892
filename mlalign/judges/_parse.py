"""What a chat completion says: its text, and yes or no. Standard library only.

Read strictly: what is not plainly a yes or a no is undecided, with the reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlalign.judges import UNDECIDED, Answer, Written

CONTENT_FILTER = "the server's content filter"
EMPTY = "empty answer"
REFUSED = "refused by the model"
UNPARSED = "neither yes nor no"
_MARKS = "\u2581\u0120\u010a"
"""What some tokenizers write for a blank or a line end at the start of a token."""


class Verdict(NamedTuple):
    """An answer and what it was read from."""

    answer: Answer
    how: str
    """logprobs or text; the reason where undecided."""


def completion(text: str) -> dict[str, Any] | None:
    """The body of an answer, or None where it is no chat completion."""
    try:
        response = json.loads(text)
    except ValueError:
        return None
    choices = response.get("choices") if isinstance(response, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    content = message.get("content") if isinstance(message, dict) else 0
    return response if content is None or isinstance(content, str) else None


def text_of(response: dict[str, Any]) -> Written:
    """The text of a chat completion, stripped, or why there is none."""
    choice = response["choices"][0]
    text = (choice["message"].get("content") or "").strip()
    if choice.get("finish_reason") == "content_filter":
        return Written(None, CONTENT_FILTER)
    if not text:
        return Written(None, REFUSED if choice["message"].get("refusal") else EMPTY)
    return Written(text)


def cut_short(response: dict[str, Any]) -> bool:
    """Whether the text ends because it reached the most tokens allowed."""
    return response["choices"][0].get("finish_reason") == "length"


def usage(response: dict[str, Any]) -> tuple[int | None, int | None]:
    """Tokens read and written, None where the server does not say."""
    given = response.get("usage")
    found = given if isinstance(given, dict) else {}
    read, written = found.get("prompt_tokens"), found.get("completion_tokens")
    return read if isinstance(read, int) else None, written if isinstance(written, int) else None


def yes_or_no(
    response: dict[str, Any], yes: Sequence[str], no: Sequence[str], min_mass: float
) -> Verdict:
    """Probabilities of the first token where the server gives them, else the text at 1 and 0.

    ``min_mass``: what yes and no must have together for the first token to be the answer; below
    it the text is read.
    """
    masses = first_token(response)
    p_yes, p_no = (sum(masses.get(word, 0.0) for word in words) for words in (yes, no))
    if p_yes + p_no > 0 and p_yes + p_no >= min_mass:
        return Verdict(Answer(min(p_yes, 1.0), min(p_no, 1.0)), "logprobs")
    text, failure = text_of(response)
    if text is None:
        return Verdict(UNDECIDED, failure)
    said = [_says(text, words) for words in (yes, no)]
    if said[0] == said[1]:
        return Verdict(UNDECIDED, UNPARSED)
    return Verdict(Answer(1.0, 0.0) if said[0] else Answer(0.0, 1.0), "text")


def first_token(response: dict[str, Any]) -> dict[str, float]:
    """Probability of each word that the first token may be, blanks around it removed; empty where
    the server gives none, or gives what is no log-probability."""
    masses: dict[str, float] = {}
    try:
        first = response["choices"][0]["logprobs"]["content"][0]
        # The chosen token need not be among the likeliest.
        for each in {t["token"]: t for t in [first, *(first.get("top_logprobs") or ())]}.values():
            logp = float(each["logprob"])
            if math.isnan(logp) or logp > 1e-3:
                return {}
            word = each["token"].strip().strip(_MARKS)
            masses[word] = masses.get(word, 0.0) + math.exp(logp)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return {}
    return masses


def _says(text: str, words: Sequence[str]) -> bool:
    """Whether a text is one of the words, or opens with it and a mark: "Yes.", "No, there is"."""
    spelled = "|".join(re.escape(word) for word in words)
    return re.match(rf"[\"'*(]*(?:{spelled})[\"'*)]*(?:[.,;:!\n]|$)", text) is not None
