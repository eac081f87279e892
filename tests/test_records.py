"""Records refuse what cannot be used, and come back from JSON as they went."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlalign.records import (
    Claim,
    Dialogue,
    Example,
    Facts,
    ImageRef,
    ObjectFact,
    Preference,
    RecordError,
    Segment,
    example_from_json,
    facts_from_json,
    preference_from_json,
    to_json,
)

IMAGE = ImageRef(path="a.png")
GOOD: dict[str, Any] = {
    "id": "p-1",
    "image": IMAGE,
    "image_sha256": "",
    "prompt": "Describe.",
    "chosen": "A cat.",
    "rejected": "A dog.",
}


def preference(**changes: Any) -> Preference:
    return Preference(**{**GOOD, **changes})


@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize(
    ("text", "says"),
    [("", "empty"), (" \n\t", "empty"), (None, "NoneType, not text"), (3, "int, not text")],
)
def test_text_that_is_none(key: str, text: Any, says: str) -> None:
    with pytest.raises(RecordError) as caught:
        preference(**{key: text})
    assert str(caught.value).startswith(f"record 'p-1', {key}: ")
    assert says in str(caught.value)
    assert (caught.value.record_id, caught.value.key) == ("p-1", key)


@pytest.mark.parametrize("rejected", ["A cat.", " A cat.\n"])
def test_equal_sides(rejected: str) -> None:
    with pytest.raises(RecordError, match=r"record 'p-1', rejected: equal to chosen"):
        preference(rejected=rejected)


@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
def test_image_tag_in_text(key: str) -> None:
    with pytest.raises(RecordError, match=f"{key}: contains <image>.*Remove the tag"):
        preference(**{key: "<image>\nWhat?"})


@pytest.mark.parametrize(("start", "end"), [(0, 7), (-1, 2), (3, 3), (4, 2)])
def test_segment_outside_its_text(start: int, end: int) -> None:
    with pytest.raises(RecordError, match="segments: span"):
        preference(segments=(Segment(side="chosen", start=start, end=end, label="object"),))


def test_segment_is_measured_on_its_own_side() -> None:
    span = Segment(side="rejected", start=2, end=12, label="object")
    assert preference(rejected="A very old dog.", segments=(span,)).segments == (span,)


def test_example_and_dialogue_check_their_text() -> None:
    common: dict[str, Any] = {"image": IMAGE, "image_sha256": "", "source": "s"}
    with pytest.raises(RecordError, match="prompt: empty"):
        Example(id="e", prompt=" ", facts=Facts(), **common)
    with pytest.raises(RecordError, match="turns: no turn"):
        Dialogue(id="d", turns=(), **common)
    with pytest.raises(RecordError, match=r"turns\.assistant: empty"):
        Dialogue(id="d", turns=(("Q?", ""),), **common)


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        preference().chosen = "x"  # type: ignore[misc]


def test_image_needs_a_place() -> None:
    with pytest.raises(ValueError, match="path or data"):
        ImageRef()


def test_image_bytes_come_before_the_path(tmp_path: Any) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(b"on disk")
    assert ImageRef(path=str(file)).read() == b"on disk"
    held = ImageRef(path=str(file), data=b"held")
    assert held.sha256() == hashlib.sha256(b"held").hexdigest()
    with pytest.raises(FileNotFoundError):
        ImageRef(path=str(tmp_path / "none.png")).read()


def test_error_says_record_key_problem_and_mend() -> None:
    error = RecordError("r-9", "image", "cannot be read", "Check the path")
    assert str(error) == "record 'r-9', image: cannot be read. Check the path"
    assert error.reason == "image: cannot be read"


texts = st.text(min_size=1, max_size=30).filter(lambda t: t.strip() and "<image>" not in t)
numbers = st.floats(allow_nan=False, allow_infinity=False)
objects = st.builds(
    ObjectFact,
    name=texts,
    box=st.none() | st.tuples(numbers, numbers, numbers, numbers),
    attributes=st.lists(texts, max_size=2).map(tuple),
    position=st.none() | texts,
)
facts = st.builds(
    Facts,
    objects=st.lists(objects, max_size=3).map(tuple),
    captions=st.lists(texts, max_size=2).map(tuple),
    answer=st.none() | texts,
    scene=st.none() | texts,
    exhaustive=st.booleans(),
)
claims = st.builds(
    Claim,
    side=texts,
    text=texts,
    question=texts,
    p_yes=numbers,
    p_no=numbers,
    verdict=st.sampled_from(["yes", "no"]),
)


@given(facts)
def test_facts_round_trip(value: Facts) -> None:
    assert facts_from_json(json.loads(json.dumps(to_json(value)))) == value


@given(texts, facts)
def test_example_round_trip(prompt: str, value: Facts) -> None:
    made = Example(id="e", image=IMAGE, image_sha256="0", prompt=prompt, facts=value, source="s")
    assert example_from_json(json.loads(json.dumps(to_json(made)))) == made


@given(
    st.tuples(texts, texts).filter(lambda pair: pair[0].strip() != pair[1].strip()),
    facts,
    st.lists(claims, max_size=2).map(tuple),
    st.dictionaries(texts, numbers, max_size=2),
)
def test_preference_round_trip(
    sides: tuple[str, str], value: Facts, said: tuple[Claim, ...], scores: dict[str, float]
) -> None:
    made = preference(
        chosen=sides[0],
        rejected=sides[1],
        segments=(Segment(side="chosen", start=0, end=1, label="edit", weight=5.0),),
        claims=said,
        scores=scores,
        rejected_image=ImageRef(path="b.png"),
        facts=value,
        origin={"builder": "povid", "seed": 3},
    )
    assert preference_from_json(json.loads(json.dumps(to_json(made)))) == made


def test_image_bytes_stay_out_of_json() -> None:
    made = preference(image=ImageRef(path="a.png", data=b"\x00\xff"))
    assert to_json(made)["image"] == {"path": "a.png"}
    again = preference_from_json(to_json(made), made.image)
    assert again == made
