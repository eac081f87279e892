"""PPO: its loss against plain forwards in float64, its adapters, resuming, two processes."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mlalign import methods, store
from mlalign.microworld import world
from mlalign.models._adapters import adapter_in_place
from mlalign.recipe import configure, from_dict
from mlalign.train import launch
from tests.train.pairs import make_pairs

ALGORITHMS = "mlalign.train.algorithms"


@pytest.fixture(scope="module")
def reward_model(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter folder of a reward model, trained for three steps."""
    run = tmp_path_factory.mktemp("reward")
    pairs = run / "pairs"
    store.write_preferences(pairs, make_pairs(12), {})
    raw = _recipe(tiny_llava, 3)
    raw["data"] = {"pairs": {"arm": str(pairs)}}
    raw["train"] |= {"algorithm": {"name": "reward_model", "heldout": 0.0}, "save_every": 0}
    recipe = from_dict(raw)
    method = methods.find(ALGORITHMS, "reward_model")
    method(configure(method, recipe.train.algorithm, "x")).train(recipe, "arm", run)
    return run / "arm/adapter"


def test_the_loss_is_ppos_by_plain_forwards(
    tiny_llava: Path, reward_model: Path, tmp_path: Path
) -> None:
    trainer = _train(_recipe(tiny_llava, 2, reward_model), tmp_path)
    own = trainer.settings
    trainer.args.gradient_accumulation_steps = trainer.parts
    trainer._rollout = trainer._roll([0, 1, 2, 3])
    queue = trainer._shuffled(0)
    # The policy has moved on since the rollout.
    inner = trainer.accelerator.unwrap_model(trainer.model)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.05 * noise.to(parameter) * (1.0 if "lora_B" in name else 0.2)
    inner.eval()
    total = sum(float(part.batch.mask_CS.sum()) for part in queue)
    assert total == float(queue[0].tokens)
    wanted, given, clipped = 0.0, 0.0, 0
    for part in queue:
        given += float(trainer.compute_loss(inner, {"part": part}).detach())
        for c in range(len(part.batch.row_C)):
            policy, value = _plain(trainer, part.batch, c)
            for t in range(int(part.batch.mask_CS[c].sum())):
                advantage = float(part.advantage_CS[c, t])
                ratio = math.exp(policy[t] - float(part.old_CS[c, t]))
                held = min(max(ratio, 1 - own.clip), 1 + own.clip)
                clipped += ratio != held
                wanted += max(-advantage * ratio, -advantage * held) / total
                old, target = float(part.value_CS[c, t]), float(part.return_CS[c, t])
                near = min(max(value[t], old - own.value_clip), old + own.value_clip)
                worse = max((value[t] - target) ** 2, (near - target) ** 2)
                wanted += own.vf_coef * 0.5 * worse / total
    assert given == pytest.approx(wanted, rel=1e-4)
    assert clipped > 3


def test_policy_value_and_reward_share_one_base(
    tiny_llava: Path, reward_model: Path, tmp_path: Path
) -> None:
    trainer = _train(_recipe(tiny_llava, 2, reward_model), tmp_path)
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"default", "value", "score"}
    state = model.state_dict()
    saved = load_file(reward_model / "adapter_model.safetensors")
    for name, value in saved.items():
        own = f"backbone.{name}".replace(".weight", ".reward.weight")
        torch.testing.assert_close(state[own], value)  # frozen
        moved = state[own.replace(".reward.", ".value.")]
        assert moved.shape == value.shape
    files = {f.name for f in (tmp_path / "runs/run/ppo/adapter").iterdir()}
    assert "adapter_model.safetensors" in files and not files & {"reward", "value"}
    # The value began as the reward model: at step 0 it is its score at the last token.
    fresh = _trainer(_recipe(tiny_llava, 2, reward_model), tmp_path / "b")
    inner = fresh.accelerator.unwrap_model(fresh.model)
    for name, value in saved.items():
        own = f"backbone.{name}".replace(".weight", ".value.weight")
        torch.testing.assert_close(inner.state_dict()[own], value)


def test_a_stopped_run_resumes_to_the_same_end(
    tiny_llava: Path, reward_model: Path, tmp_path: Path
) -> None:
    whole = _train(_recipe(tiny_llava, 8, reward_model), tmp_path / "whole")
    _train(_recipe(tiny_llava, 4, reward_model), tmp_path / "half")
    resumed = _train(_recipe(tiny_llava, 8, reward_model), tmp_path / "half")
    assert _trained(whole).keys() == _trained(resumed).keys()
    for name, value in _trained(whole).items():
        torch.testing.assert_close(_trained(resumed)[name], value, atol=1e-6, rtol=0)
    lines = [json.loads(x) for x in (tmp_path / "half/runs/run/rollouts.jsonl").open()]
    # Two rollouts of four prompts, four optimiser steps on each; none is there twice.
    assert sorted({line["step"] for line in lines}) == [0, 4] and len(lines) == 8


def test_two_processes_train_as_one(tiny_llava: Path, reward_model: Path, tmp_path: Path) -> None:
    _train(_recipe(tiny_llava, 2, reward_model), tmp_path / "one")
    raw = _recipe(tiny_llava, 2, reward_model)
    raw["launch"] = {"launcher": "deepspeed", "processes": 2, "zero": 2}
    rows = [_steps(tmp_path / "one"), _launched(raw, tmp_path / "two")]
    assert [r["reward"] for r in rows[1] if "reward" in r] == pytest.approx(
        [r["reward"] for r in rows[0] if "reward" in r], abs=1e-5
    )
    # Which answers share an optimiser step is drawn on each process, so steps differ.
    assert len(rows[0]) == len(rows[1]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout": 3}, r"rollout: 3 prompts are no whole steps"),
        ({"rollout": 8}, r"data\.prompts: 4, fewer than a rollout of 8"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_llava: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    raw = _recipe(tiny_llava, 2)
    raw["train"]["algorithm"] |= change
    with pytest.raises(ValueError, match=message):
        _train(raw, tmp_path)


def _plain(trainer: Any, batch: Any, c: int) -> tuple[list[float], list[float]]:
    """Log-probs and values of a completion's tokens by a forward of its own, no branching."""
    inner = trainer.accelerator.unwrap_model(trainer.model)
    ids = batch.target_CS[c][batch.mask_CS[c]]
    row = int(batch.row_C[c])
    prefix = batch.input_ids_RT[row][batch.segment_RT[row] == 0]
    image = trainer.roller._pictures
    name = batch.ids_C[c].rpartition("#")[0]
    example = next(e for e in trainer.examples if e.id == name)
    pixels = image(example.image, name).tensors["pixel_values"].reshape(1, 3, 96, 96)
    inputs = {"input_ids": torch.cat([prefix, ids])[None], "pixel_values": pixels}
    start = len(prefix) - 1
    with torch.no_grad(), adapter_in_place(inner.backbone, "default"):
        logits = inner.backbone(**inputs).logits[0, start:-1].double().log_softmax(-1)
    with torch.no_grad(), adapter_in_place(inner.backbone, "value"):
        hidden = inner.backbone.get_base_model().model(**inputs).last_hidden_state[0, start:-1]
        values = inner.score(hidden.float())[:, 0]
    return logits.gather(1, ids[:, None])[:, 0].tolist(), values.double().tolist()


def _recipe(model: Path, steps: int, reward_model: Path | None = None) -> dict[str, Any]:
    rewards: list[dict[str, Any]] = [{"name": "object_checker", "right": 1.0}]
    if reward_model is not None:
        rewards.append({"name": "reward_model"})
    return {
        "name": "run",
        "seed": 3,
        "model": {"path": str(model), "dtype": "float32", "adapter": {"rank": 4, "alpha": 16}},
        "data": {"source": "microworld", "vocabulary": "microworld", "prompts": 4},
        "train": {
            "algorithm": {
                "name": "ppo",
                "rollout": 4,
                "max_new_tokens": 10,
                "rewards": rewards,
                "reward_model": str(reward_model) if reward_model else None,
            },
            "learning_rate": 2e-3,
            "batch_size": 2,
            "micro_batch_size": 1,
            "steps": steps,
            "schedule": "constant",
            "save_every": 4,
        },
        "launch": {"launcher": "none"},
    }


def _prepare(raw: dict[str, Any], folder: Path) -> None:
    examples = [world.example("pairs", i) for i in range(raw["data"]["prompts"])]
    store.write_examples(folder / "runs/run/data/ppo", examples, {})


def _trainer(raw: dict[str, Any], folder: Path) -> Any:
    """Not trained: its learning rate is as good as nothing."""
    raw["train"]["learning_rate"] = 1e-30
    return _train(raw, folder)


def _train(raw: dict[str, Any], folder: Path) -> Any:
    _prepare(raw, folder)
    recipe = from_dict(raw)
    method = methods.find(ALGORITHMS, "ppo")
    made = method(configure(method, recipe.train.algorithm, "train.algorithm"))
    return made.train(recipe, "ppo", folder / "runs/run")


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
