"""One made-up run for all tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report import synthetic


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder; tests do not change it."""
    return synthetic.write_run(tmp_path_factory.mktemp("runs") / "synthetic")
