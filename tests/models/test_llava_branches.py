"""LLaVA-1.5: rows of branches against separate stock forwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlalign.models.loading import load_vlm_from
from tests.models import exact

SIZES = ((96, 96), (160, 96))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["dense", "split"])
def test_branches_are_exact(tiny_llava: Path, attention: str, packed: bool) -> None:
    vlm = exact.with_adapter(load_vlm_from(tiny_llava, dtype="float32"))
    exact.assert_exact(vlm, exact.case(vlm, SIZES), attention, packed=packed)
