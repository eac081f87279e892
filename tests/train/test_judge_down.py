"""A judge's server that goes down while a policy learns from it: wait, stop whole, go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlalign import methods, store
from mlalign.microworld import world
from mlalign.recipe import configure, from_dict
from mlalign.rewards._reward import RewardError, RewardUnavailable
from mlalign.runlog import read_lines
from mlalign.train import checkpoints
from tests.judges._fake_server import FakeServer, Status, chat

GROUP, STEPS, SAVED = 3, 2, 1


def test_a_run_waits_stops_whole_and_goes_on(
    tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, own = tmp_path / "runs/run", tmp_path / "runs/run/grpo"
    with FakeServer().running() as fake:
        raw = recipe(tiny_llava, fake, tmp_path / "cache")
        goes_down(fake, own / "checkpoints" / f"checkpoint-{SAVED}", Status(503))
        with pytest.raises(RewardUnavailable, match=r"claim_judge.*HTTP 503"):
            train(raw, run)
        assert "attempt 2 in 0 s" in capsys.readouterr().out
        last = checkpoints.last_complete(own / "checkpoints")
        assert last is not None and last.name == f"checkpoint-{SAVED}"
        assert not (own / "adapter").exists()
        answered = fake.total
        fake.on_request, fake.default = lambda number: None, chat("Yes.")
        resumed = train(raw, run)
        assert fake.total > answered and resumed.state.global_step == STEPS
    assert (own / "adapter").is_dir()
    lines = read_lines(run / "rollouts.jsonl")
    assert len({(x["step"], x["id"], x["sample"]) for x in lines}) == len(lines)
    assert len(lines) == STEPS * 2 * GROUP
    assert min(line["reward"] for line in lines) < 0


def test_a_judge_that_refuses_stops_at_once(
    tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer(Status(401)).running() as fake:
        raw = recipe(tiny_llava, fake, tmp_path / "cache")
        with pytest.raises(RewardError, match=r"HTTP 401.*judge\.api_key_env"):
            train(raw, tmp_path / "runs/run")
        assert fake.total <= 2  # the second was under way, or never sent
    assert "attempt 2" not in capsys.readouterr().out


def goes_down(fake: FakeServer, once: Path, status: Status) -> None:
    """Every other question is false; from the first request after ``once`` is there, none is."""

    def turn(number: int) -> None:
        fake.default = status if once.exists() else chat("Yes." if number % 2 else "No.")

    fake.on_request = turn


def recipe(model: Path, fake: FakeServer, cache: Path) -> dict[str, Any]:
    """Words at random name objects, and each is a claim: the judge is asked at every step."""
    return {
        "name": "run",
        "seed": 3,
        "model": {"path": str(model), "dtype": "float32", "adapter": {"rank": 4, "alpha": 16}},
        "data": {
            "source": "microworld",
            "vocabulary": "microworld",
            "prompts": 2 * STEPS,
            "judge": {
                "name": "server",
                "base_url": fake.url,
                "model": "m",
                "cache": str(cache),
                "attempts": 1,
                "concurrency": 1,
            },
        },
        "train": {
            "algorithm": {
                "name": "grpo",
                "group": GROUP,
                "max_new_tokens": 24,
                "beta": 0.0,
                "rewards": [{"name": "claim_judge"}],
                "attempts": 2,
                "wait": 0.0,
            },
            "learning_rate": 2e-3,
            "batch_size": 2,
            "micro_batch_size": 2,
            "steps": STEPS,
            "schedule": "constant",
            "save_every": SAVED,
        },
        "launch": {"launcher": "none", "processes": 1, "zero": 0},
    }


def train(raw: dict[str, Any], run: Path) -> Any:
    examples = [world.example("pairs", i) for i in range(raw["data"]["prompts"])]
    store.write_examples(run / "data/grpo", examples, {})
    loaded = from_dict(raw)
    ref = loaded.train.algorithm
    method = methods.find("mlalign.train.algorithms", ref.name)
    return method(configure(method, ref, "train.algorithm")).train(loaded, "grpo", run)
