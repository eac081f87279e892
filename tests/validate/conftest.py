"""A model folder without its weights: what reads them has nothing to read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlalign.microworld.model import base_folder


@pytest.fixture(scope="session")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The microworld's model folder, its weights left out."""
    folder = tmp_path_factory.mktemp("weightless")
    for file in base_folder().iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    return folder
