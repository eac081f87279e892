"""The table over seeds: means, spreads, the control's own columns."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from mlalign.report.seeds import table


def test_mean_and_spread_over_runs(tmp_path: Path) -> None:
    for seed, value in enumerate((0.1, 0.3)):
        _run(tmp_path / f"s{seed}", value, blind=False)
        _run(tmp_path / f"s{seed}-blind", value / 2, blind=True)
    text = table([tmp_path / name for name in ("s0", "s1", "s0-blind", "s1-blind")])
    lines = text.splitlines()
    assert lines[0] == "| | base | povid | povid, blind |"
    rows = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert "| 40.0 ± 0.0 | 20.0 ± 14.1 | 10.0 ± 7.1 |" in rows["CHAIR_i %"]
    assert "| 2.000 ± 0.000 | 3.000 ± 0.000 |  |" in rows["reliance, blank (nats/token)"]


def _run(folder: Path, value: float, *, blind: bool) -> None:
    folder.mkdir()
    raw = {
        "name": folder.name,
        "model": {"path": "m"},
        "data": {"pairs": {"povid": "p"}},
        "train": {
            "objective": "dpo",
            "learning_rate": 1e-3,
            "batch_size": 4,
            "steps": 5,
            "blank_images": blind,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    sides = {"before": {"halluc/chair_i": 0.4}, "after": {"halluc/chair_i": value}}
    (folder / "summary.json").write_text(json.dumps({"seed": 0, "builders": {"povid": sides}}))
    name = "probe/image_reliance/blank_per_token/chosen"
    row = {"arm": "povid", "step": 5, name: 3.0, f"{name}/base": 2.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
