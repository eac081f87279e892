"""Images that are trained on and measured on: found by their bytes, wherever they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlalign import store
from mlalign.microworld import world
from mlalign.microworld.export import export
from mlalign.probes import _records
from mlalign.validate.examine import examine
from tests.validate import planted


def recipe(at: Path, **source: Any) -> Path:
    pairs = planted.write(at / "pairs.jsonl", planted.clean_rows(at, 6))
    return planted.recipe(
        at / "recipe.yaml",
        pairs,
        data={"pairs": {"ours": str(pairs)}, "vocabulary": "microworld", "source": source},
        eval={"benchmarks": ["chair"], "images": 6},
        probes={"methods": ["neuron_drift"], "records": 2},
    )


def test_built_held_out_examples_and_probes(tmp_path: Path, weightless: Path) -> None:
    file = recipe(tmp_path, name="microworld")
    clean = examine(file, [f"model.path={weightless}"], runs=tmp_path)
    assert clean.findings == []
    run = tmp_path / "checked"
    # Pairs 2 and 5 (rows 3 and 6) look at scenes that are held out or probed.
    held = [world.example("heldout", 0), world.example("pairs", 2)]
    store.write_examples(run / "data" / "heldout", held, {})
    probed = world.example("pairs", 5)
    texts = dict.fromkeys(("own", "chosen", "rejected"), "A mug.")
    record = _records.ProbeRecord(
        id="p", image=probed.image, prompt="What?", facts=probed.facts, **texts
    )
    _records.save(run / "probe_set", [record])
    out = examine(file, [f"model.path={weightless}"], runs=tmp_path)
    assert [(f.row, f.record, f.kind) for f in out.faults] == [
        (3, "r3", "image: measured on too"),
        (6, "r6", "image: measured on too"),
    ]
    assert (
        "microworld-pairs-2" in out.faults[0].problem and "probe record p" in out.faults[1].problem
    )


def test_the_source_is_asked_where_nothing_is_built(tmp_path: Path, weightless: Path) -> None:
    pictures = export(tmp_path / "user", pairs=1, pictures=12) / "pictures"
    names = sorted(p.name for p in (pictures / "images").iterdir())
    (pictures / "dev.txt").write_text("\n".join(names[:4]))
    (pictures / "train.txt").write_text("\n".join(names[4:]))
    folder = tmp_path / "checked"
    folder.mkdir()
    file = recipe(
        folder,
        name="photo_folder",
        folder=str(pictures),
        probe=3,
        vocabulary="microworld",
    )
    assert examine(file, [f"model.path={weightless}"], runs=tmp_path).findings == []
    # The same bytes under another name.
    held = (pictures / "images" / names[1]).read_bytes()
    (folder / "4.png").write_bytes(held)
    out = examine(file, [f"model.path={weightless}"], runs=tmp_path)
    assert [(f.row, f.record) for f in out.faults] == [(5, "r5")]
    assert f"held-out example {Path(names[1]).stem}" in out.faults[0].problem
