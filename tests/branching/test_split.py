"""Split attention equals attention under the dense mask, outputs and gradients, for any rows."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mlalign.branching import split
from mlalign.branching.attention import attend
from mlalign.branching.batch import PrefixBatch
from mlalign.branching.layout import attention_mask, lay_out, pack
from mlalign.branching.split import Branches, choose

GROUPS = st.lists(
    st.tuples(st.integers(1, 7), st.lists(st.integers(1, 5), min_size=1, max_size=6)),
    min_size=1,
    max_size=5,
)


def laid(groups: list[tuple[int, list[int]]], room: int) -> PrefixBatch:
    rows = pack([p + sum(c) for p, c in groups], room)
    prefixes = [[3] * p for p, _ in groups]
    completions = [[[4] * n for n in c] for _, c in groups]
    return lay_out(prefixes, completions, pad_id=0, rows=rows)


@given(groups=GROUPS, room=st.integers(1, 60), block=st.sampled_from([1, 4, 256]))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equal_to_the_dense_mask(groups: list, room: int, block: int, kv_heads: int) -> None:
    batch = laid(groups, room)
    rows, tokens = batch.input_ids_RT.shape
    module = nn.Module()
    module.num_key_value_groups = 4 // kv_heads  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, h, tokens, 8) for h in (4, kv_heads, kv_heads)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.double) for s in shapes]
    upstream = torch.randn(rows, tokens, 4, 8, generator=generator, dtype=torch.double)
    upstream[batch.segment_RT < 0] = 0
    found = []
    before, split.BLOCK = split.BLOCK, block
    try:
        for keywords in ({"branches": Branches(batch)}, {}):
            inputs = [t.clone().requires_grad_() for t in tensors]
            out = attend(module, *inputs, attention_mask(batch), **keywords)[0]
            (out * upstream).sum().backward()
            found.append([out.masked_fill((batch.segment_RT < 0)[..., None, None], 0), *(
                t.grad for t in inputs)])  # fmt: skip
    finally:
        split.BLOCK = before
    for mine, dense in zip(*found, strict=True):
        torch.testing.assert_close(mine, dense, atol=1e-12, rtol=1e-12)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), room=st.integers(1, 50))
def test_packing_keeps_every_group_and_its_room(lengths: list[int], room: int) -> None:
    rows = pack(lengths, room)
    assert sorted(g for row in rows for g in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[g] for g in row) <= room for row in rows)
    sums = sorted(sum(lengths[g] for g in row) for row in rows)
    assert all(a + b > room for a, b in itertools.pairwise(sums))


def test_blocks_hold_every_completion_once() -> None:
    stops = [10, 100, 150, 400, 410, 420]
    blocks = list(split._blocks(stops))
    assert blocks == [[10, 100, 150], [150, 400], [400, 410, 420]]
    assert list(split._blocks([7])) == []


def test_split_is_refused_where_it_is_not_exact() -> None:
    batch = laid([(3, [2, 2])], 10)
    windowed = lay_out([[1]], [[[2]]], pad_id=0)
    object.__setattr__(windowed, "windows", (("", 4),))
    text = SimpleNamespace(_attn_implementation=split.NAME)
    core = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    assert choose(core, batch) == "split"
    assert choose(core, batch, "dense") == "dense"
    assert choose(core, windowed) == "dense"
    with pytest.raises(ValueError, match="sliding windows"):
        choose(core, windowed, "split")
    text._attn_implementation = "sdpa"
    assert choose(core, batch) == "dense"
    with pytest.raises(ValueError, match="another function"):
        choose(core, batch, "split")
