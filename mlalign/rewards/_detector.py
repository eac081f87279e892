"""Object detectors behind one small interface: an image in, names with scores out.

A detector is any callable ``PIL image -> sequence of Detected``. One that has an attribute
``names`` (the classes that it knows) leaves the others undecided; one without answers for every
object. ``TransformersDetector`` runs any object detector of transformers (DETR, YOLOS, RT-DETR,
Grounding DINO is none) from a folder or the Hub.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL import Image

from mlalign import methods
from mlalign.images import open_image
from mlalign.records import Example
from mlalign.rewards._reward import RewardError


class Detected(NamedTuple):
    """One object that a detector saw."""

    name: str
    """The detector's own word for it."""
    score: float
    """0 to 1."""
    box: tuple[float, float, float, float] | None = None
    """x0, y0, x1, y1 in pixels of the image."""


Detector = Callable[[Image.Image], Sequence[Detected]]


class Sightings:
    """The best score of each object in each image; an image is looked at once."""

    def __init__(self, detector: Detector, vocabulary: Any) -> None:
        self.detector = detector
        self.vocabulary = vocabulary
        known = getattr(detector, "names", None)
        self.known = None if known is None else frozenset(map(self._canonical, known))
        self._seen: dict[str, dict[str, float]] = {}

    def score(self, example: Example, name: str) -> float | None:
        """Best score of the object, 0 where it was not seen, None where the detector has no such
        class. Raises RewardError for a score that is no probability, RecordError for an image that
        cannot be read."""
        if self.known is not None and name not in self.known:
            return None
        key = example.image_sha256 or example.id
        if key not in self._seen:
            self._seen[key] = self._look(example)
        return self._seen[key].get(name, 0.0)

    def _look(self, example: Example) -> dict[str, float]:
        best: dict[str, float] = {}
        for found in self.detector(open_image(example.image, example.id)):
            name, score = self._canonical(found.name), float(found.score)
            if math.isnan(score) or not -1e-6 <= score <= 1 + 1e-6:
                problem = f"the detector gave {found.name!r} a score of {score}"
                raise RewardError("object_checker", example.id, problem, "Scores are 0 to 1")
            best[name] = max(score, best.get(name, 0.0))
        return best

    def _canonical(self, word: str) -> str:
        return self.vocabulary.canonical(word) or word


class TransformersDetector:
    """An object detector of transformers, on the CPU or where ``device`` says."""

    def __init__(self, path: str, *, device: str = "cpu", floor: float = 0.01) -> None:
        """``floor``: detections below it are left out; they count as not seen."""
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.processor = AutoImageProcessor.from_pretrained(path)
        self.model = AutoModelForObjectDetection.from_pretrained(path).eval().to(device)
        self.device = device
        self.floor = floor
        labels = self.model.config.id2label
        self.names = frozenset(label for label in labels.values() if label != "N/A")

    def __call__(self, image: Image.Image) -> list[Detected]:
        """What is seen, boxes in pixels of the image."""
        import torch

        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            out = self.model(**inputs)
        found = self.processor.post_process_object_detection(
            out, threshold=self.floor, target_sizes=[(image.height, image.width)]
        )[0]
        labels = self.model.config.id2label
        rows = zip(
            found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True
        )
        return [Detected(labels[number], score, tuple(box)) for number, score, box in rows]


def find_detector(name: str) -> Detector:
    """``package.module:Name`` (a detector, or a class that is one when made without arguments),
    else a folder or Hub id of transformers. Raises ValueError where the name is no callable."""
    module, colon, _ = name.partition(":")
    if colon and not Path(name).exists() and importlib.util.find_spec(module.partition(".")[0]):
        found = methods.find("", name)
        made = found() if isinstance(found, type) else found
        if not callable(made):
            raise ValueError(f"detector {name!r} is no callable: image -> names with scores")
        return cast(Detector, made)
    return TransformersDetector(name)
