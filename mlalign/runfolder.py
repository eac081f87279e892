"""The run folder's first files: the resolved recipe and what it ran on, before any weight loads."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from mlalign import __version__
from mlalign.recipe import Recipe, save
from mlalign.store import write_json_atomic

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "bitsandbytes",
)


class RunFolderError(ValueError):
    """A run folder that belongs to another recipe. The message names the keys and the mend."""


def prepare(recipe: Recipe, runs: Path = Path("runs")) -> Path:
    """``runs/<name>`` with recipe.yaml and manifest.json; the same again for the same recipe.

    Raises RunFolderError where the folder holds another recipe: a run is continued, never mixed.
    """
    folder = runs / recipe.name
    file = folder / "recipe.yaml"
    if file.is_file():
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
        changed = _differences(before, recipe.model_dump(mode="json"))
        if changed:
            raise RunFolderError(
                f"{folder} was made with another recipe; it differs in {', '.join(changed[:8])}. "
                f"Remove {folder}, add --fresh, or give another name with name=..."
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "manifest.json", manifest(recipe))
    save(recipe, file)
    return folder


def manifest(recipe: Recipe) -> dict[str, Any]:
    """Versions, hardware, code revision and seed of a run."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "mlalign": __version__,
        "git": _git(),
        "versions": versions(),
        "hardware": hardware(),
    }


def add(folder: Path, **facts: Any) -> None:
    """Add facts (data fingerprints, stage seconds) to a run's manifest."""
    file = folder / "manifest.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    for key, fact in facts.items():
        if isinstance(fact, dict) and isinstance(value.get(key), dict):
            value[key] |= fact
        else:
            value[key] = fact
    write_json_atomic(file, value)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """Machine, cores and accelerators."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus or "none",
    }


def _git() -> dict[str, Any]:
    """Revision of the checkout that the code lies in, and whether it was changed; empty without."""
    here = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", "."],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"revision": revision, "changed": bool(status)}


def _differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two plain mappings differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in sorted(before.keys() | after.keys()):
            found += _differences(before.get(key), after.get(key), f"{prefix}{key}.")
        return found
    return [] if before == after else [prefix.rstrip(".")]
