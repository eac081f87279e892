"""What several test files share. Nothing here is heavy until a test asks for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = "MLALIGN_SHARED_DATA"

# Two cores, and often a second process of the same test: more threads only get in each other's way.
# Beside another worker, one.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test may need the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples each time, and none refused because another process has the cores.
settings.register_profile(
    "repository", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repository")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with pyproject.toml."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of photographs and annotations; the test is skipped where it is not there."""
    folder = Path(os.environ.get(SHARED_DATA) or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no photographs: {folder} is not there; set {SHARED_DATA}")
    return folder


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained microworld LLaVA: model, processor and tokenizer."""
    from mlalign.microworld.model import new_model, new_processor

    folder = tmp_path_factory.mktemp("tiny_llava")
    new_model(seed=0).save_pretrained(folder)
    new_processor().save_pretrained(folder)
    return folder
