"""Peak memory of one side's step, in a process of its own: peak resident less resident after
loading (on CUDA: allocated).

    python -m mlalign.bench.peak SIDE CACHED '{"layers": 8, ...}'      prints the bytes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

from mlalign.bench.setting import Setting


def measure(side: str, setting: Setting, cached: bool = False) -> int:
    """Bytes, from a fresh process. Raises RuntimeError with its message where it fails."""
    arguments = [side, str(int(cached)), json.dumps(setting.describe())]
    # glibc keeps what tensors under 32 MB leave on its heap; so it gives all of it back.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "mlalign.bench.peak", *arguments],
        capture_output=True,
        text=True,
        env=env,
    )
    if done.returncode:
        raise RuntimeError(f"bench: {side} failed\n{done.stderr.strip()[-2000:]}")
    return int(done.stdout.split()[-1])


class _Watch(threading.Thread):
    """Highest resident memory of this process, sampled every millisecond."""

    def __init__(self) -> None:
        import psutil

        super().__init__(daemon=True)
        self.process = psutil.Process()
        self.before = self.highest = self.process.memory_info().rss
        self.on = True

    def run(self) -> None:
        while self.on:
            self.highest = max(self.highest, self.process.memory_info().rss)
            time.sleep(0.001)


def _here(side: str, setting: Setting, cached: bool) -> int:
    import torch

    from mlalign.bench.dpo import sides

    step = sides(setting, cached, (side,))[side].step
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    watch = _Watch()
    watch.start()
    step()
    watch.on = False
    watch.join()
    return watch.highest - watch.before


if __name__ == "__main__":
    wanted = json.loads(sys.argv[3])
    wanted["completions"] = tuple(wanted["completions"])
    print(_here(sys.argv[1], Setting(**wanted), bool(int(sys.argv[2]))))
