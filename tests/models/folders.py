"""Small untrained models of every family with their processors, for tests of what all share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.models import (
    qwen,
    test_gemma3,
    test_idefics3,
    test_internvl,
    test_llava_next,
    test_llava_onevision,
)

BUILD: dict[str, Callable[[Path], Path]] = {
    "llava_next": test_llava_next.new_folder,
    "llava_onevision": test_llava_onevision.new_folder,
    **qwen.FAMILIES,
    "idefics3": partial(test_idefics3.build, kind="idefics3"),
    "smolvlm": partial(test_idefics3.build, kind="smolvlm"),
    "internvl": test_internvl.new_folder,
    "gemma3": test_gemma3.build,
}
"""What writes a small model folder, by the name of the family's file; LLaVA's is ``tiny_llava``."""
