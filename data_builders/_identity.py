"""What the pairs of a build depend on: the key by which a stopped build is taken up again."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import data_builders
import mlalign

ROOMS = (
    "branching",
    "generate.py",
    "images.py",
    "judges",
    "methods.py",
    "microworld",
    "models",
    "objects.py",
    "recipe.py",
    "records.py",
    "sections.py",
    "store.py",
    "vocabularies",
)
"""What of mlalign takes part in making pairs; training, evaluation and reports may change."""
_TEXTS = frozenset({".py", ".txt", ".json", ".yaml"})
"""Code, prompts and word lists. Weights are the caller's to name."""
_PACKAGES = ("torch", "transformers", "pillow")


def settings_of(builder: Any) -> dict[str, Any]:
    """A builder's settings as JSON values; none where it has none."""
    settings = getattr(builder, "settings", None)
    return settings.model_dump(mode="json") if settings is not None else {}


def identity(builder: Any, about: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the pairs, but for ``max_skipped``, which only judges them.

    ``about``: source, seed, model and judge, as the caller names them.
    """
    return {
        "builder": builder.name,
        "chunk": builder.chunk,
        "settings": settings_of(builder),
        "about": about,
        "code_sha256": _code(builder),
        "versions": {
            "python": ".".join(platform.python_version_tuple()[:2]),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
    }


def _code(builder: Any) -> str:
    """SHA-256 over the builders, what they use of mlalign, and the builder's own file."""
    roots = [Path(p) for p in data_builders.__path__]
    roots += [Path(p) / room for p in mlalign.__path__ for room in ROOMS]
    digest = hashlib.sha256()
    for root in roots:
        for file in _files(root):
            digest.update(f"{file.relative_to(root.parent)}\0".encode() + _sha256(file))
    own = getattr(sys.modules.get(type(builder).__module__), "__file__", None)
    if own is not None:
        digest.update(_sha256(Path(own)))
    return digest.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for file in sorted(root.rglob("*")):
        if file.suffix in _TEXTS and file.is_file() and "__pycache__" not in file.parts:
            yield file


def _sha256(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()
