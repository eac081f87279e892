"""A whole run under a reward that pays for silence: what is looked at, marked and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlalign import methods, store
from mlalign.benchmarks.evaluate import evaluate
from mlalign.microworld import world
from mlalign.objects import vocabulary
from mlalign.recipe import MethodRef, configure, from_dict
from mlalign.report import rewards
from mlalign.report.figures import Figures
from mlalign.report.folder import Run
from mlalign.runlog import read_lines
from mlalign.sections import EvalSection
from mlalign.train.watching import PREFIX, SHOWN

PROMPTS, IMAGES, STEPS, EVERY = 2, 3, 6, 3
RAW: dict[str, Any] = {
    "name": "run",
    "seed": 3,
    "model": {
        "path": "builtin:microworld",
        "dtype": "float32",
        "adapter": {"rank": 8, "alpha": 16},
    },
    "data": {"source": "microworld", "vocabulary": "microworld", "prompts": PROMPTS},
    "train": {
        "algorithm": {
            "name": "grpo",
            "group": 8,
            "max_new_tokens": 48,
            "beta": 0.0,
            # Nothing but words costs anything: the best answer is none.
            "rewards": [{"name": "length_penalty"}],
            "watch_every": EVERY,
            "watch_images": IMAGES,
        },
        "learning_rate": 5e-3,
        "batch_size": PROMPTS,
        "micro_batch_size": PROMPTS,
        "steps": STEPS,
        "schedule": "constant",
    },
    "launch": {"launcher": "none", "processes": 1, "zero": 0},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    run = tmp_path_factory.mktemp("runs") / "run"
    store.write_examples(run / "data/grpo", [world.example("pairs", i) for i in range(PROMPTS)], {})
    store.write_examples(
        run / "data/heldout", [world.example("heldout", i) for i in range(IMAGES + 1)], {}
    )
    recipe = from_dict(RAW)
    ref = recipe.train.algorithm
    method = methods.find("mlalign.train.algorithms", ref.name)
    made = method(configure(method, ref, "train.algorithm"))
    return run, made.train(recipe, "grpo", run)


def looks(run: Path) -> dict[int, dict[str, Any]]:
    rows = read_lines(run / "metrics.jsonl")
    return {row["step"]: row for row in rows if "watch/reward_hacking" in row}


def test_the_reward_rises_while_the_answers_shrink(trained: tuple[Path, Any]) -> None:
    run, _ = trained
    seen = looks(run)
    assert list(seen) == [0, EVERY, STEPS]
    assert all(PREFIX + key in row for row in seen.values() for key in SHOWN)
    first, last = seen[0], seen[STEPS]
    assert last["watch/halluc/length"] < 0.7 * first["watch/halluc/length"]
    assert last["watch/halluc/recall"] < first["watch/halluc/recall"] - 0.2
    assert first["watch/reward_hacking"] == 0.0 and last["watch/reward_hacking"] == 1.0
    events = [e for e in read_lines(run / "events.jsonl") if e["event"] == "reward hacking"]
    assert [e["step"] for e in events] == [
        s for s, row in seen.items() if row[f"{PREFIX}reward_hacking"]
    ]
    told = events[-1]
    rewards_logged = [r["reward"] for r in read_lines(run / "metrics.jsonl") if "reward" in r]
    # At a step's end its own reward is not logged yet: the look stands beside the one before.
    assert (
        told["rise"] == pytest.approx(rewards_logged[STEPS - 2] - rewards_logged[0])
        and told["rise"] > 0
    )
    lengths = first["watch/halluc/length"], last["watch/halluc/length"]
    assert told["fell"][0].startswith("recall ")
    assert told["fell"][1] == f"length {lengths[0]:.1f} to {lengths[1]:.1f} words"


def test_a_look_is_the_benchmark_itself(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """The last look's numbers, by evaluating the trained model as `mlalign eval` does."""
    run, trainer = trained
    chair: Any = MethodRef(name="chair", **{"max_new_tokens": 64})
    section = EvalSection(benchmarks=(chair,), images=IMAGES, batch_size=8, bootstrap=100)
    found = evaluate(
        trainer.vlm,
        store.read_examples(run / "data/heldout"),
        section,
        vocabulary("microworld"),
        label="after",
        folder=tmp_path,
        seed=3,
    )
    last = looks(run)[STEPS]
    for key in SHOWN:
        assert last[PREFIX + key] == pytest.approx(found[key], abs=1e-6), key


def test_the_report_of_the_run_shows_the_mark(trained: tuple[Path, Any]) -> None:
    made = rewards.section(Run(trained[0]), Figures())
    assert made is not None and f"<td>{STEPS}</td>" in made.html and "length " in made.html
    assert "rose while its answers got worse" in rewards.warnings(Run(trained[0]))[0]
