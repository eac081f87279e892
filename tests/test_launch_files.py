"""The files under launch/: filled by the recipe, free of hyper-parameters, and they run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests._syntax import REPOSITORY

LAUNCH = REPOSITORY / "launch"
CONFIGS = sorted(LAUNCH.glob("*.json"))
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
HYPER_PARAMETERS = ("learning_rate", "batch_size", "beta", "epochs", "rank=", "steps")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_files_that_recipes_may_ask_for() -> None:
    assert [path.name for path in CONFIGS] == ["zero2.json", "zero3.json", "zero3_offload.json"]
    assert len(SCRIPTS) == 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_config_is_filled_by_the_recipe(path: Path) -> None:
    config = read(path)
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[key] == "auto", key
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    # A DeepSpeed optimizer would have to be compiled, and would differ from stage to stage.
    assert not {"optimizer", "scheduler"} & config.keys()


@pytest.mark.parametrize(
    ("name", "stage", "offloads"),
    [("zero2", 2, False), ("zero3", 3, False), ("zero3_offload", 3, True)],
)
def test_stage_is_what_the_name_says(name: str, stage: int, offloads: bool) -> None:
    zero = read(LAUNCH / f"{name}.json")["zero_optimization"]
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero) == ("offload_param" in zero) == offloads


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_transformers_fills_every_auto(path: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    # The arguments without deepspeed: filling alone must not start a process group.
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    shape = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    filled = HfTrainerDeepSpeedConfig(str(path))
    filled.trainer_config_process(args)
    filled.trainer_config_finalize(args, LlamaForCausalLM(shape), num_training_steps=4)
    assert '"auto"' not in json.dumps(filled.config)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_is_sound(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK), "not executable"
    assert "set -euo pipefail" in text
    subprocess.run(["bash", "-n", str(path)], check=True)
    found = [word for word in HYPER_PARAMETERS if word in text]
    assert not found, f"these belong into a recipe: {found}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_script_without_a_recipe_says_how(path: Path) -> None:
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def fake(folder: Path, name: str, text: str = 'echo "$0" "$@"\n') -> None:
    """A program that prints how it was called."""
    program = folder / name
    program.write_text("#!/usr/bin/env bash\n" + text, encoding="utf-8")
    program.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of launch/ with a stand-in virtual environment beside it."""
    (tmp_path / "launch").mkdir()
    for script in SCRIPTS:
        copy = tmp_path / "launch" / script.name
        copy.write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("mlalign", "deepspeed"):
        fake(tmp_path / ".venv" / "bin", name)
    return tmp_path


def call(checkout: Path, *args: str, **env: str) -> list[str]:
    """What the stand-in was called with: its name, then its arguments."""
    done = subprocess.run(
        ["bash", *args], cwd=checkout, capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    program, *rest = done.stdout.split()
    return [Path(program).name, *rest]


def test_one_node(checkout: Path) -> None:
    assert call(checkout, "launch/train.sh", "r.yaml", "seed=1") == [
        "mlalign",
        "train",
        "r.yaml",
        "seed=1",
    ]


def test_several_nodes(checkout: Path) -> None:
    (checkout / "hosts").write_text("a slots=8\n", encoding="utf-8")
    called = call(
        checkout, "launch/train_multinode.sh", "hosts", "r.yaml", "seed=1", MASTER_PORT="2345"
    )
    assert called[:3] == ["deepspeed", "--hostfile", "hosts"]
    assert "--master_port 2345 --module mlalign.train r.yaml seed=1" in " ".join(called)


def test_several_nodes_without_a_hostfile(checkout: Path) -> None:
    script = "launch/train_multinode.sh"
    done = subprocess.run(
        ["bash", script, "gone", "r.yaml"], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "launch/hostfile.example" in done.stderr


def test_slurm_gives_each_task_its_rank(checkout: Path) -> None:
    bin_folder = checkout / ".venv" / "bin"
    fake(bin_folder, "scontrol", 'echo "node-a"; echo "node-b"\n')
    # One task of many, as srun would start it.
    fake(bin_folder, "srun", 'shift; SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16 exec "$@"\n')
    fake(
        bin_folder,
        "python",
        'echo "$0" "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$MASTER_ADDR" "$MASTER_PORT" "$@"\n',
    )
    called = call(
        checkout,
        "launch/slurm.sbatch",
        "r.yaml",
        "seed=1",
        SLURM_JOB_NODELIST="node-[a-b]",
        SLURM_JOB_ID="77",
        SLURM_SUBMIT_DIR=str(checkout),
    )
    assert called[:6] == ["python", "9", "1", "16", "node-a", "20077"]
    assert called[6:] == ["-m", "mlalign.train", "r.yaml", "seed=1"]


def test_hostfile_example_is_what_deepspeed_reads() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(LAUNCH / "hostfile.example")) == {"node-a": 8, "node-b": 8}


def test_recipes_ask_for_files_that_are_there() -> None:
    from mlalign.train.launch import deepspeed_config

    asked = 0
    for path in (REPOSITORY / "recipes").rglob("*.yaml"):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "launch" not in raw:
            continue
        from mlalign.sections import LaunchSection

        launch = LaunchSection(**raw["launch"])
        config = deepspeed_config(launch)
        assert (config is None) == (launch.zero == 0)
        asked += 1
    assert asked or not (REPOSITORY / "recipes" / "quickstart.yaml").exists()
