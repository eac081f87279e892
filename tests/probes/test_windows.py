"""Sliding windows: reproduced where the mask of the rows holds them, else refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from mlalign.probes._probe import ATTENTION, BLANK
from tests.probes import eager, tiny
from tests.probes.spy import Spy

WINDOW = 12
"""Shorter than any row: the image alone has more tokens."""


def test_rows_within_a_window_equal_eager_s() -> None:
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    vlm = tiny.new_vlm(text=Qwen2Config, **window)
    assert set(vlm.core.config.text_config.layer_types) == {"full_attention", "sliding_attention"}
    vlm.model.double()
    spy = Spy({ATTENTION})
    tiny.new_pass(vlm, [spy], count=2).run(0)
    seen = spy.watches[0]
    for row, item in enumerate(seen.batch.items):
        # The model's own mask over a plain row, as transformers makes it.
        whole_LHTT = eager.attention(vlm, item, 0)
        positions = seen.batch.queries(row)[0]
        length = len(item.prefix) + len(item.completions[0])
        for layer in range(tiny.LAYERS):
            found_HQT = seen.rows["response", layer, row][:, : len(positions)]
            gap = found_HQT[..., :length] - whole_LHTT[layer][:, positions]
            assert gap.abs().max() < 1e-6 and found_HQT[..., length:].abs().max() == 0
            far = torch.arange(length) <= positions[:, None] - WINDOW
            assert far.any() and bool(found_HQT[..., :length][:, far].any()) == (layer < 1)


def test_a_window_that_no_mask_holds_is_refused_by_name() -> None:
    vlm = tiny.new_vlm()
    block: Any = vlm.layers[1]
    block.self_attn.sliding_window = WINDOW
    for spy in (Spy({ATTENTION}), Spy({BLANK})):
        with pytest.raises(ValueError, match="spy: llama: block 1 attends over a sliding window"):
            tiny.new_pass(vlm, [spy], count=1)
