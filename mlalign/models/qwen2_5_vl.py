"""Qwen2.5-VL: Qwen2-VL's layout with a tower that attends in windows.

Serves ``Qwen2_5_VLForConditionalGeneration``. The tower (arXiv 2502.13923, section 2.1) sorts
patches by window and hands merged features back in the order of the image, so that tokens, grid
and positions of an image are those of Qwen2-VL.
"""

from __future__ import annotations

from mlalign.models.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """What is particular to the family."""

    architectures = ("Qwen2_5_VLForConditionalGeneration",)


METHOD = Qwen25VL
