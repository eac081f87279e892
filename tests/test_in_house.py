"""The template for a user's own model and pairs: complete, explained, and it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from mlalign import recipe
from mlalign.data.reader import load_pairs
from mlalign.microworld.export import export
from mlalign.objects import vocabulary
from mlalign.recipe import Recipe
from tests._syntax import REPOSITORY

TEMPLATE = REPOSITORY / "recipes" / "in_house" / "template.yaml"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("user"), pairs=8, pictures=16)


def missing(model: type[BaseModel], raw: dict[str, Any], at: str = "") -> list[str]:
    """Keys of a section that the template leaves out."""
    found = []
    for key, field in model.model_fields.items():
        if key not in raw:
            found.append(at + key)
        elif isinstance(raw[key], dict) and key != "pairs":  # its keys are names of arms
            inner = recipe._section_of(field.annotation)
            if inner is not None:
                found += missing(inner, raw[key], f"{at}{key}.")
    return found


def test_template_shows_every_key() -> None:
    raw = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    assert missing(Recipe, raw) == []


def test_template_explains_every_key() -> None:
    bare = [
        line
        for line in TEMPLATE.read_text(encoding="utf-8").splitlines()
        # A line that only opens a section is explained by the lines in it.
        if line.strip() and not line.endswith(":") and "#" not in line
    ]
    allowed = ("weight_decay", "max_grad_norm", "log_every", "rank", "records", "batch_size")
    assert [line for line in bare if not line.strip().startswith(allowed)] == []


def test_export_is_what_a_user_has(exported: Path) -> None:
    pairs, skipped = load_pairs(exported / "pairs.jsonl")
    assert len(pairs) == 8 and not skipped
    words = vocabulary("microworld")
    for pair in pairs:
        chosen, rejected = (
            [s.name for s in words.objects(t)] for t in (pair.chosen, pair.rejected)
        )
        assert len(chosen) == len(rejected)
        assert sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1
    rows = [json.loads(line) for line in (exported / "pairs.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"images", "prompt", "chosen", "rejected"}


def test_export_is_the_same_each_time(exported: Path, tmp_path: Path) -> None:
    again = export(tmp_path / "again", pairs=8, pictures=16)
    files = sorted(p.relative_to(exported) for p in exported.rglob("*") if p.is_file())
    assert len(files) == 8 + 16 + 2
    for file in files:
        assert (exported / file).read_bytes() == (again / file).read_bytes(), file


def overrides(model: Path | str, data: Path) -> list[str]:
    """What a user changes in the template, and what makes the run short."""
    return [
        "name=ours",
        f"model.path={model}",
        f"data.pairs.ours={data / 'pairs.jsonl'}",
        f"data.source.folder={data / 'pictures'}",
        "data.source.probe=2",
        "data.source.vocabulary=microworld",
        "data.vocabulary=microworld",
        "train.learning_rate=1e-4",
        "train.epochs=null",
        "train.steps=2",
        "train.batch_size=4",
        "train.micro_batch_size=2",
        "probes.records=2",
        "eval.images=4",
        "eval.bootstrap=100",
        "launch.launcher=none",
        "launch.zero=0",
    ]


def test_template_parses_with_the_lines_a_user_changes(exported: Path) -> None:
    parsed = recipe.load(TEMPLATE, overrides("some/model", exported))
    assert parsed.arms() == ["ours"]


def test_one_command(exported: Path, tiny_llava: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlalign.cli", "run", str(TEMPLATE)]
    done = subprocess.run(
        [*command, *overrides(tiny_llava, exported)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "runs" / "ours"
    for name in ("recipe.yaml", "manifest.json", "metrics.jsonl", "pairs.jsonl", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "ours" / "adapter" / "adapter_config.json").is_file()
    arm = json.loads((run / "summary.json").read_text(encoding="utf-8"))["builders"]["ours"]
    for side in ("before", "after"):
        assert {"halluc/chair_i", "halluc/recall", "halluc/length", "pope/accuracy"} <= arm[
            side
        ].keys()
    for probe in ("attention_grounding", "neuron_drift", "image_reliance"):
        assert list((run / "probes" / "ours").glob(f"{probe}-*.parquet")), probe
