"""The engine: skips counted by reason, no pair is an error, nothing half-written."""

import json
from collections import Counter

import pytest

from data_builders import engine
from data_builders._context import BuildContext
from data_builders.povid import METHOD as POVID
from mlalign.microworld import world
from mlalign.objects import vocabulary
from mlalign.records import ImageRef, Preference, Skip


class Simple:
    """Makes one pair of each example, or what ``act`` returns."""

    name = "simple"
    chunk = 4
    expected = frozenset({"not for this method"})

    def __init__(self, act=None):
        self.act = act or (lambda example: pair(example.id))
        self.seen = Counter()

    def build_many(self, chunk):
        for example in chunk:
            self.seen["examples"] += 1
            yield self.act(example)

    def finish(self, candidates):
        yield from candidates

    def report(self, seen):
        return {"extra": dict(seen)}


def pair(record_id: str, chosen: str = "Yes.", rejected: str = "No.") -> Preference:
    example = world.example("pairs", 0)
    return Preference(
        id=f"simple-{record_id}-0",
        image=ImageRef(data=example.image.read(), path="a.png"),
        image_sha256=example.image_sha256,
        prompt="Is it?",
        chosen=chosen,
        rejected=rejected,
    )


def scenes(count):
    return [world.example("pairs", i) for i in range(count)]


def test_skips_are_counted_by_reason_with_first_ids(tmp_path):
    def act(example):
        number = int(example.id.split("-")[-1])
        if number % 2:
            return Skip(id=example.id, reason="not for this method")
        return Skip(id=example.id, reason="odd thing") if number == 4 else pair(example.id)

    records = [*scenes(9), Skip(id="gone", reason="image cannot be read")]
    manifest = engine.build(
        Simple(act), records, out_folder=tmp_path / "out", max_skipped=0.25, about={"seed": 7}
    )
    assert manifest["skipped"] == {
        "not for this method": {
            "count": 4,
            "expected": True,
            "first_ids": [f"microworld-pairs-{i}" for i in (1, 3, 5)],
        },
        "odd thing": {"count": 1, "expected": False, "first_ids": ["microworld-pairs-4"]},
        "image cannot be read": {"count": 1, "expected": False, "first_ids": ["gone"]},
    }
    assert manifest["records"] == 10 and manifest["pairs"] == 4
    assert manifest["faulty_share"] == 0.2 and manifest["seed"] == 7
    assert manifest["extra"] == {"examples": 9}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["pairs"] == 4


def test_what_was_asked_stands_in_the_manifest_counted_to_the_last_pair(tmp_path):
    simple = Simple()
    manifest = engine.build(
        simple,
        scenes(9),
        out_folder=tmp_path / "out",
        max_skipped=0,
        asked=lambda: {"judge_report": {"questions": simple.seen["examples"]}},
    )
    # The counter is cleared for each chunk: the last of them had one example.
    assert manifest["judge_report"] == {"questions": 1}
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert written["judge_report"] == {"questions": 1}


def test_too_many_faults_stop_the_build(tmp_path):
    records = [*scenes(6), *(Skip(id=f"bad{i}", reason="image is truncated") for i in range(4))]
    with pytest.raises(engine.BuildError) as error:
        engine.build(Simple(), records, out_folder=tmp_path / "out", max_skipped=0.3)
    assert "4 of 10" in str(error.value) and "data.max_skipped" in str(error.value)
    assert "4 x image is truncated (e.g. bad0, bad1, bad2)" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"], "a raised limit goes on with it"


def test_no_pair_at_all_says_why(tmp_path):
    builder = Simple(lambda example: Skip(id=example.id, reason="not for this method"))
    with pytest.raises(engine.BuildError, match="no pair at all from 3 records") as error:
        engine.build(builder, scenes(3), out_folder=tmp_path / "out", max_skipped=1.0)
    assert "3 x not for this method (e.g. microworld-pairs-0" in str(error.value)
    with pytest.raises(engine.BuildError, match="the source gave no record"):
        engine.build(Simple(), [], out_folder=tmp_path / "out", max_skipped=1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupt_leaves_the_old_file_whole(tmp_path, stop):
    out = tmp_path / "out"
    engine.build(Simple(), scenes(3), out_folder=out, max_skipped=0.0)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def act(example):
        if example.id.endswith("-5"):
            raise stop
        return pair(example.id)

    with pytest.raises((KeyboardInterrupt, OSError)):
        engine.build(Simple(act), scenes(9), out_folder=out, max_skipped=0.0)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.partial"]
    assert engine.build(Simple(), scenes(9), out_folder=out, max_skipped=0.0)["pairs"] == 9
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "problem"),
    [("", "No.", "empty"), ("Yes.", "Yes. ", "equal to chosen"), ("<image> a", "b", "<image>")],
)
def test_a_bad_pair_is_named_and_nothing_written(tmp_path, chosen, rejected, problem):
    builder = Simple(lambda example: pair(example.id, chosen, rejected))
    with pytest.raises(ValueError, match=problem) as error:
        engine.build(builder, scenes(2), out_folder=tmp_path / "out", max_skipped=1.0)
    assert "simple-microworld-pairs-0-0" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_povid_without_captions_and_builders_without_a_model():
    context = BuildContext(vocabulary=vocabulary("coco"), language="english")
    with pytest.raises(ValueError, match="needs a model"):
        from data_builders.rlaif_v import METHOD

        METHOD(METHOD.Settings(), context)
    with pytest.raises(ValueError, match="english, microworld"):
        POVID(POVID.Settings(), BuildContext(vocabulary=None, language="latin"))
    with pytest.raises(ValueError, match="weights of object, attribute, relation"):
        POVID.Settings(kinds={"objects": 1.0})
