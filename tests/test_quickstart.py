"""The quickstart recipe, whole but small: two steps through the real launcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

KEYS = (
    "halluc/chair_s",
    "halluc/chair_i",
    "halluc/recall",
    "halluc/length",
    "pope/accuracy",
    "pope/f1",
    "pope/yes_rate",
    "pope/unparsed_rate",
    "lm/clean_caption_nll",
)
SMALL = (
    "train.steps=2",
    "data.examples=40",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "probes.every=1",
    "probes.records=4",
    "eval.images=10",
    "eval.bootstrap=100",
)


def test_the_whole_of_it(repository: Path, tmp_path: Path) -> None:
    said = _mlalign(tmp_path, "run", str(repository / "recipes/quickstart.yaml"), *SMALL)
    run = tmp_path / "runs/quickstart"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seed"] == 0 and set(summary["builders"]) == {"ha_dpo", "povid", "rlaif_v"}
    for sides in summary["builders"].values():
        for side in ("before", "after"):
            assert sides[side]["n"] == 10
            for key in KEYS:
                low, high = sides[side][f"{key}_ci95"]
                assert low <= sides[side][key] <= high and sides[side][f"{key}_n"] > 0
    for name in ("report.html", "metrics.jsonl", "pairs.jsonl", "manifest.json", "recipe.yaml"):
        assert (run / name).stat().st_size > 0
    for arm in summary["builders"]:
        steps = [r["step"] for r in _rows(run / "metrics.jsonl") if r["arm"] == arm and "loss" in r]
        assert steps == [1, 2]
        assert (run / arm / "adapter/adapter_model.safetensors").is_file()
        for probe in ("attention_grounding", "neuron_drift", "image_reliance"):
            assert len(list((run / "probes" / arm).glob(f"{probe}-*.parquet"))) == 3
    assert "CHAIR_i" in said and "report.html" in said

    record = _rows(run / "pairs.jsonl")[0]["id"]
    assert record in _mlalign(tmp_path, "show", "runs/quickstart", record)
    again = _mlalign(tmp_path, "run", str(repository / "recipes/quickstart.yaml"), *SMALL)
    assert "CHAIR_i" in again  # nothing is done twice
    other = _mlalign(
        tmp_path, "run", str(repository / "recipes/quickstart.yaml"), "seed=1", status=2
    )
    assert "was made with another recipe" in other and "seed" in other


def _mlalign(folder: Path, *words: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mlalign.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
