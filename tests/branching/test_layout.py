"""The shared-prefix row: masks, positions, and equality with separate unpadded rows."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from mlalign.branching.batch import PADDING, PREFIX
from mlalign.branching.layout import LayoutError, attention_mask, common_prefix, lay_out
from mlalign.branching.logps import completion_logps, next_token_logps
from mlalign.images import open_image
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from, lora_config
from mlalign.sections import LoraSection
from tests.train.pairs import make_pairs


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3)),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=40, deadline=None)
def test_mask_against_its_definition(rows: list) -> None:
    batch = _batch(rows)
    seen = attention_mask(batch)[:, 0]
    for row, query, key in itertools.product(*map(range, seen.shape)):
        of_query, of_key = int(batch.segment_RT[row, query]), int(batch.segment_RT[row, key])
        if PADDING in (of_query, of_key):
            expected = query == key
        else:
            expected = key <= query and of_key in (PREFIX, of_query)
        assert bool(seen[row, query, key]) is expected


def test_positions_continue_from_the_prefix_and_sources_predict_targets() -> None:
    batch = _batch([(3, [2, 1]), (1, [3])])
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 0, 0]]
    assert batch.source_CS[:, 0].tolist() == [2, 2, 0]  # the prefix's last token, K times
    assert batch.row_C.tolist() == [0, 0, 1] and batch.last_C.tolist() == [4, 5, 3]
    assert batch.mask_CS.sum(-1).tolist() == [2, 1, 3]


@pytest.mark.parametrize(
    ("prefixes", "completions", "words"),
    [
        ([[1]], [[]], "no completion"),
        ([[1]], [[[]]], "has no token"),
        ([[]], [[[1]]], "empty prefix"),
    ],
)
def test_rows_that_cannot_be_laid_out_are_refused(
    prefixes: list, completions: list, words: str
) -> None:
    with pytest.raises(LayoutError, match=words) as caught:
        lay_out(prefixes, completions, pad_id=0, ids=[["record-7"]])
    assert "record-7" in str(caught.value)


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1], [2]]) == 0


def test_equal_to_separate_unpadded_rows_with_an_adapter(tiny_llava: Path) -> None:
    vlm = _with_adapter(tiny_llava)
    prefixes, completions, pixels = [], [], []
    for pair, texts in zip(
        make_pairs(3), (["A red kettle.", "Nothing."], ["No."], None), strict=True
    ):
        answers = texts or [pair.chosen, pair.rejected, "A blue boat."]
        prefix, branches = vlm.branch_ids(pair.prompt, answers, (96, 96), pair.id)
        prefixes.append(prefix)
        completions.append(branches)
        pixels.append(vlm.image(open_image(pair.image, pair.id)))
    batch = vlm.encode(vlm.rows(prefixes, completions, pixels))
    together = completion_logps(vlm.model, batch)
    together.logps_CS.sum().backward()
    shared = _take_gradients(vlm)
    after_C = next_token_logps(vlm.model, batch)
    index = 0
    for prefix, branches, image in zip(prefixes, completions, pixels, strict=True):
        for branch in branches:
            logits = vlm.model(
                input_ids=torch.tensor([prefix + branch]),
                pixel_values=image.tensors["pixel_values"],
            ).logits[0]
            logps = logits.log_softmax(-1)
            expected = logps[len(prefix) - 1 : -1].gather(1, torch.tensor(branch)[:, None])[:, 0]
            actual = together.logps_CS[index][together.mask_CS[index]]
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(after_C[index], logps[-1].detach(), atol=1e-5, rtol=0)
            expected.sum().backward()
            index += 1
    for name, expected in _take_gradients(vlm).items():
        assert (shared[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_a_value_that_is_not_finite_names_its_record(tiny_llava: Path) -> None:
    vlm = load_vlm_from(tiny_llava, dtype="float32")
    prefix, branches = vlm.branch_ids("Describe the image.", ["A red kettle."], (96, 96))
    image = vlm.blank()
    image.tensors["pixel_values"].fill_(float("nan"))
    batch = vlm.encode(vlm.rows([prefix], [branches], [image], ids=[["pair-nan"]]))
    with pytest.raises(FloatingPointError, match="pair-nan"):
        completion_logps(vlm.model, batch)


def _batch(rows: list) -> object:
    prefixes = [list(range(1, n + 1)) for n, _ in rows]
    completions = [[[7] * length for length in lengths] for _, lengths in rows]
    return lay_out(prefixes, completions, pad_id=0)


def _with_adapter(folder: Path) -> VLM:
    vlm = load_vlm_from(folder, dtype="float32")
    vlm.model = get_peft_model(vlm.model, lora_config(LoraSection(rank=4, alpha=32), vlm))
    torch.manual_seed(0)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return vlm


def _take_gradients(vlm: VLM) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad()
    assert found
    return found
