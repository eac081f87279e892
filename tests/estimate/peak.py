"""Run in a process of its own: peak resident memory of a training step, less what was resident
before it, for each case. Prints JSON: case -> [bytes measured, bytes estimated]."""

from __future__ import annotations

import gc
import json
import threading
import time

import psutil
import torch
from transformers import LlamaConfig

from mlalign.estimate.memory import estimate
from mlalign.estimate.rows import Layout, Rows
from mlalign.sections import LoraSection
from tests.estimate import tiny

CASES: dict[str, tuple[Layout, bool]] = {
    "shared": ("shared", False),
    "padded": ("padded", False),
    "shared, checkpointing": ("shared", True),
}


class Watch(threading.Thread):
    """Samples this process's resident memory every millisecond until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.highest, self.on = psutil.Process(), 0, True

    def run(self) -> None:
        while self.on:
            self.highest = max(self.highest, self.process.memory_info().rss)
            time.sleep(0.001)


def measure(layout: Layout, checkpointing: bool) -> list[int]:
    """[measured, estimated] bytes of one step of 4 x 512 on a row of 600 + 200 + 200 tokens."""
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    rows = Rows(prefix=600, completions=(200, 200), layout=layout)
    model, geometry, plan = tiny.model_and_plan(
        tiny.config(text),
        rows,
        lora=LoraSection(rank=16),
        checkpointing=checkpointing,
        attention="dense" if layout == "shared" else "causal",
    )
    if checkpointing:
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = tiny.shared_row(rows, torch.float32) if layout == "shared" else tiny.padded_rows(rows)
    # Once in small, so that gradients are there, and what libraries set up and keep.
    small = tiny.shared_row(Rows(prefix=20, completions=(4, 4)), torch.float32)
    tiny.hidden(model, small).sum().backward()
    gc.collect()
    before = psutil.Process().memory_info().rss
    watch = Watch()
    watch.start()
    tiny.hidden(model, inputs).square().mean().backward()
    watch.on = False
    watch.join()
    need = estimate(geometry, plan)
    # The mask was there before.
    mask = plan.dtype_bytes * rows.tokens**2 if layout == "shared" else 0
    return [watch.highest - before, need.activations + need.features + need.peak - mask]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: measure(*case) for name, case in CASES.items()}))
