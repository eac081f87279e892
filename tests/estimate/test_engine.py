"""Bytes that autograd keeps in the branching engine's own pass: split attention, tiled head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from mlalign.branching.attention import use
from mlalign.branching.layout import lay_out
from mlalign.branching.logps import completion_logps
from mlalign.estimate.memory import estimate
from mlalign.estimate.rows import Rows
from mlalign.sections import LoraSection
from tests.estimate import tiny
from tests.estimate.test_activations import LORA, SHAPE, kept


@pytest.mark.parametrize("attention", ["split", "dense"])
@pytest.mark.parametrize("heads", [8, 2])
@pytest.mark.parametrize(
    ("completions", "layout", "pairs", "lora"),
    [
        ((40, 60), "shared", 1, LORA),
        ((40, 60), "shared", 2, LORA),
        ((40, 40), "padded", 1, LORA),
        ((30, 40, 50, 90, 130), "shared", 1, LORA),
        ((60,), "shared", 1, LORA),
        ((40, 60), "shared", 1, None),
    ],
    ids=["pair", "two pairs", "padded", "five", "one", "full"],
)
def test_a_pass_of_the_engine(
    completions: tuple[int, ...],
    layout: Any,
    pairs: int,
    lora: LoraSection | None,
    heads: int,
    attention: Any,
) -> None:
    rows = Rows(prefix=120, completions=completions, layout=layout)
    text = LlamaConfig(**SHAPE, num_key_value_heads=heads)
    model, geometry, plan = tiny.model_and_plan(
        tiny.config(text), rows, lora=lora, pairs=pairs, attention=attention
    )
    core = tiny.core_of(model)
    use(core)
    prefix = [tiny.IMAGE_ID] * 16 + [7] * 104
    groups = [[[8] * n for n in completions]] * pairs
    if layout == "padded":
        groups = [[each] for each in groups[0]]
    batch = lay_out([prefix] * len(groups), groups, pad_id=0)
    with torch.no_grad():
        image = core.model.get_image_features(torch.zeros(1, 3, 56, 56), return_dict=True)
    image.pooler_output = list(image.pooler_output) * len(groups)
    batch = replace(batch, features=image)
    measured = kept(model, lambda: completion_logps(model, batch, attention).logps_CS)
    need = estimate(geometry, plan)
    # Besides: which positions are gathered, and which of the padded places are real.
    assert need.activations + need.head == pytest.approx(measured, rel=0.005)
