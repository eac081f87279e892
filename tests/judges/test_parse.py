"""Yes and no from completions: probabilities by hand, texts strictly."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlalign.judges._parse import completion, first_token, text_of, usage, yes_or_no
from tests.judges._fake_server import completion as answer

YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")


def likely(chosen: str, masses: dict[str, float], text: str | None = None) -> dict[str, Any]:
    """A completion with log-probabilities of its first token."""
    tops = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in masses.items()]
    first = {"token": chosen, "logprob": math.log(masses[chosen]), "top_logprobs": tops}
    return answer(chosen if text is None else text, logprobs={"content": [first]})


def read(response: dict[str, Any], min_mass: float = 0.1) -> tuple[float, float, str]:
    verdict = yes_or_no(response, YES, NO, min_mass)
    return verdict.answer.p_yes, verdict.answer.p_no, verdict.how


def test_masses_are_summed_over_spellings() -> None:
    masses = {"Yes": 0.4, " yes": 0.1, "\u2581YES": 0.05, "No": 0.2, "\u0120no": 0.1, "The": 0.15}
    p_yes, p_no, how = read(likely("Yes", masses))
    assert (p_yes, p_no, how) == (pytest.approx(0.55), pytest.approx(0.3), "logprobs")
    # The verdict is that of the masses, not of the likeliest token.
    p_yes, p_no, how = read(likely("Yes", {"Yes": 0.4, "no": 0.3, "No": 0.29}))
    assert p_no > p_yes and how == "logprobs"


def test_the_chosen_token_counts_once_wherever_it_stands() -> None:
    response = likely("Yes", {"Yes": 0.6, "No": 0.4})
    assert read(response)[0] == pytest.approx(0.6)
    response["choices"][0]["logprobs"]["content"][0]["top_logprobs"].pop(0)
    assert read(response)[:2] == pytest.approx((0.6, 0.4))


def test_little_mass_reads_the_text() -> None:
    masses = {"\n": 0.9, "yes": 0.02, "no": 0.03}
    assert read(likely("\n", masses, "\nYes")) == (1.0, 0.0, "text")
    undecided = read(likely("\n", masses, "\n"))
    assert math.isnan(undecided[0]) and undecided[2] == "empty answer"
    p_yes, p_no, how = read(likely("\n", masses, "\nYes"), min_mass=0.0)
    assert (p_yes, p_no, how) == (pytest.approx(0.02), pytest.approx(0.03), "logprobs")
    # No spelling at all is no answer, whatever the least mass.
    nothing = read(likely("The", {"The": 0.9, "A": 0.1}), min_mass=0.0)
    assert math.isnan(nothing[0]) and math.isnan(nothing[1]) and nothing[2] == "neither yes nor no"


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"content": None},
        {"content": []},
        {"content": [{"token": "Yes"}]},
        {"content": [{"token": "Yes", "logprob": float("nan")}]},
        {"content": [{"token": "Yes", "logprob": 0.9}]},
        {"content": [{"token": None, "logprob": -0.1}]},
        {"content": [{"token": "Yes", "logprob": "high"}]},
        "none",
    ],
)
def test_what_is_no_log_probability_is_not_used(logprobs: Any) -> None:
    response = answer("No.", logprobs=logprobs)
    assert first_token(response) == {}
    assert read(response) == (0.0, 1.0, "text")


@pytest.mark.parametrize(
    "text", ["yes", "Yes.", " YES! ", "Yes, there is no pot.", '"Yes"', "Yes\nno", "**Yes**"]
)
def test_texts_that_say_yes(text: str) -> None:
    assert read(answer(text)) == (1.0, 0.0, "text")


@pytest.mark.parametrize("text", ["no", "No.", "No; it is yes-red.", "NO,"])
def test_texts_that_say_no(text: str) -> None:
    assert read(answer(text)) == (0.0, 1.0, "text")


@pytest.mark.parametrize(
    "text",
    [
        "Nope",
        "Yesterday",
        "No doubt",
        "yes or no",
        "I think yes.",
        "Not sure",
        "yEs",
        "1",
        "Yes/No",
        "",
    ],
)
def test_texts_that_say_neither(text: str) -> None:
    p_yes, p_no, _ = read(answer(text))
    assert math.isnan(p_yes) and math.isnan(p_no)


def test_completions() -> None:
    assert completion("{") is None and completion('"text"') is None
    # A message without content is one that the model had nothing to say in.
    bare = completion('{"choices": [{"message": {"role": "assistant"}}]}')
    assert bare is not None and text_of(bare) == (None, "empty answer")


def test_usage() -> None:
    assert usage(answer("x")) == (11, 3)
    for given in (None, [], {}, {"prompt_tokens": "many", "completion_tokens": None}):
        assert usage({"usage": given}) == (None, None)
