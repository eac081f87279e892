"""How training is started: the command line, the DeepSpeed configuration, the environment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from mlalign.sections import LaunchSection

PROBES_FAILED = 3
"""Exit status of a run that succeeded in everything but a probe."""
LAUNCH_FOLDER = Path(__file__).parents[2] / "launch"


class LaunchError(ValueError):
    """A launch section that does not fit the rest. The message names the key and the mend."""


def deepspeed_config(launch: LaunchSection) -> dict[str, Any] | None:
    """The JSON of ``launch/`` for the recipe's ZeRO stage; None where DeepSpeed is not used.

    Its "auto" values are filled from the recipe by transformers.
    """
    if launch.zero == 0:
        return None
    name = f"zero{launch.zero}{'_offload' if launch.offload else ''}.json"
    return json.loads((LAUNCH_FOLDER / name).read_text(encoding="utf-8"))


def command(launch: LaunchSection, recipe_file: Path) -> list[str]:
    """The command that trains a resolved recipe."""
    if launch.launcher == "none":
        return [sys.executable, "-m", "mlalign.train", str(recipe_file)]
    # The launcher of the running environment, not one that happens to be first on PATH.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if launch.hostfile is not None:
        launcher += ["--hostfile", launch.hostfile]
    else:
        launcher += ["--num_gpus", str(launch.processes), "--master_port", str(_free_port())]
    return [*launcher, "--module", "mlalign.train", str(recipe_file)]


def environment(launch: LaunchSection) -> dict[str, str]:
    """Environment of the training processes: the cores are shared out between them."""
    cores = len(os.sched_getaffinity(0))
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // launch.processes)))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("DS_ACCELERATOR", "cuda" if _has_cuda() else "cpu")
    return env


def accumulation(batch_size: int, micro_batch_size: int, processes: int) -> int:
    """Micro-batches per step and process. Raises LaunchError where the batch does not divide."""
    per_pass = micro_batch_size * processes
    if batch_size % per_pass:
        raise LaunchError(
            f"train.batch_size {batch_size} is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {processes} process(es). Change one of them"
        )
    return batch_size // per_pass


def world_size() -> int:
    """Processes of this launch, from the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


def join(launch: LaunchSection) -> None:
    """Start the process group through DeepSpeed, before anything else does.

    Weights that load afterwards are sharded as they load under ZeRO-3.
    """
    if launch.launcher == "none" or launch.zero == 0:
        return
    import deepspeed

    if _has_cuda():
        deepspeed.init_distributed(dist_backend="nccl", verbose=False)
        return
    # Its shared-memory collectives would be compiled on first use, by every rank at once and for
    # over a minute, on a machine that may have no compiler. Gloo needs nothing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def leave() -> None:
    """Leave the process group; a rank that ends without doing so sometimes aborts."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def forget(trainer: Any) -> None:
    """Drop a finished trainer's engine and accelerator state, so that another arm starts fresh."""
    import gc

    from accelerate.state import AcceleratorState

    trainer.accelerator.free_memory()
    trainer.model_wrapped = trainer.model = None
    AcceleratorState._reset_state()
    gc.collect()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
