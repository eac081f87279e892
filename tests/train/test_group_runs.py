"""Group training from a recipe: resuming, two processes, what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mlalign import methods, store
from mlalign.microworld import world
from mlalign.recipe import configure, from_dict
from mlalign.train import launch

GROUP = 3


@pytest.mark.parametrize("prompts", [4, 6], ids=["between epochs", "in an epoch"])
def test_a_stopped_run_resumes_to_the_same_end(
    prompts: int, tiny_llava: Path, tmp_path: Path
) -> None:
    def recipe(steps: int) -> dict[str, Any]:
        raw = _recipe(tiny_llava, steps, 1, 0)
        raw["data"]["prompts"] = prompts
        return raw

    whole = _train(recipe(4), tmp_path / "whole")
    _train(recipe(2), tmp_path / "half")
    resumed = _train(recipe(4), tmp_path / "half")
    for name, value in _trained(whole).items():
        torch.testing.assert_close(_trained(resumed)[name], value, atol=1e-6, rtol=0)
    lines = [json.loads(x) for x in (tmp_path / "half/runs/run/rollouts.jsonl").open()]
    steps = [line["step"] for line in lines]
    # Four steps of two prompts and three answers; none is there twice.
    assert len(lines) == len({(x["step"], x["id"], x["sample"]) for x in lines}) == 4 * 2 * GROUP
    assert sorted(set(steps)) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def alone(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The log of a run by one process."""
    folder = tmp_path_factory.mktemp("one")
    _train(_recipe(tiny_llava, 3, 1, 0), folder)
    return _steps(folder)


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.long), 3])
def test_two_processes_train_as_one(
    zero: int, alone: list[dict[str, Any]], tiny_llava: Path, tmp_path: Path
) -> None:
    both = _launched(_recipe(tiny_llava, 3, 2, zero), tmp_path / "two")
    assert [row["reward"] for row in both] == pytest.approx(
        [row["reward"] for row in alone], abs=1e-6
    )
    assert [row["loss"] for row in both] == pytest.approx([row["loss"] for row in alone], abs=1e-4)
    assert [row["grad_norm"] for row in both] == pytest.approx(
        [row["grad_norm"] for row in alone], rel=1e-2
    )


def test_what_cannot_be_trained_is_refused_by_name(tiny_llava: Path, tmp_path: Path) -> None:
    raw = _recipe(tiny_llava, 3, 1, 0)
    raw["train"]["algorithm"]["iterations"] = 4
    with pytest.raises(ValueError, match=r"save_every 2 .*midst of a rollout"):
        _train(raw, tmp_path / "a")
    raw = _recipe(tiny_llava, 3, 1, 0)
    raw["model"]["adapter"] = "none"
    with pytest.raises(ValueError, match=r"model\.adapter: none"):
        _train(raw, tmp_path / "b")
    raw = _recipe(tiny_llava, 3, 1, 0)
    raw["train"]["algorithm"]["rewards"] = [{"name": "reward_model"}]
    with pytest.raises(ValueError, match=r"reward_model: runs/NAME/ARM/adapter"):
        _train(raw, tmp_path / "c")


def _recipe(model: Path, steps: int, processes: int, zero: int) -> dict[str, Any]:
    return {
        "name": "run",
        "seed": 3,
        "model": {"path": str(model), "dtype": "float32", "adapter": {"rank": 4, "alpha": 16}},
        "data": {"source": "microworld", "vocabulary": "microworld", "prompts": 6},
        "train": {
            "algorithm": {
                "name": "grpo",
                "group": GROUP,
                "max_new_tokens": 12,
                "beta": 0.05,
                "rewards": [
                    {"name": "length_penalty"},
                    {"name": "object_checker", "right": 1.0, "weight": 0.5},
                ],
            },
            "learning_rate": 2e-3,
            "batch_size": 2,
            "micro_batch_size": 1,
            "steps": steps,
            "schedule": "constant",
            "save_every": 2,
        },
        "launch": {
            "launcher": "none" if processes == 1 else "deepspeed",
            "processes": processes,
            "zero": zero,
        },
    }


def _prepare(raw: dict[str, Any], folder: Path) -> None:
    examples = [world.example("pairs", i) for i in range(raw["data"]["prompts"])]
    store.write_examples(folder / "runs/run/data/grpo", examples, {})


def _train(raw: dict[str, Any], folder: Path) -> Any:
    _prepare(raw, folder)
    recipe = from_dict(raw)
    ref = recipe.train.algorithm
    method = methods.find("mlalign.train.algorithms", ref.name)
    trainer = method(configure(method, ref, "train.algorithm")).train(
        recipe, "grpo", folder / "runs/run"
    )
    return trainer


def _trained(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def _launched(raw: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    _prepare(raw, folder)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    section = from_dict(raw).launch
    done = subprocess.run(
        launch.command(section, file),
        cwd=folder,
        env={**launch.environment(section), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return _steps(folder)


def _steps(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "runs/run/metrics.jsonl").open()]
    return [row for row in rows if "loss" in row]
