"""``VLM.rows`` and ``VLM.encode``: what is refused, and what is computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mlalign.branching.layout import LayoutError
from mlalign.branching.logps import completion_logps
from mlalign.models._family import adds_bos
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from
from tests.models import exact

SIZES = ((96, 96), (160, 96))


@pytest.fixture
def vlm(tiny_llava: Path) -> VLM:
    return load_vlm_from(tiny_llava, dtype="float32")


def test_longer_than_the_positions_is_refused_by_name(vlm: VLM) -> None:
    made = exact.case(vlm, SIZES)
    room = vlm.max_positions - len(made.prefixes[0])
    fits = [[[7] * room, [8] * room]]
    # Each completion has the positions after the prefix to itself, so both fit.
    vlm.rows(made.prefixes[:1], fits, made.inputs[:1], ids=[["a", "a"]])
    with pytest.raises(LayoutError, match=rf"record-9: .*{vlm.max_positions} pos.*max_length"):
        vlm.rows(made.prefixes[:1], [[[7] * (room + 1)]], made.inputs[:1], ids=[["record-9"]])


def test_image_tokens_must_match_the_features(vlm: VLM) -> None:
    made = exact.case(vlm, SIZES)
    names = [["r0", "r0"], ["r1"], ["r2"] * 4]
    short = [list(p) for p in made.prefixes]
    short[1].remove(vlm.image_token_id)
    batch = vlm.rows(short, made.completions, made.inputs, ids=names)
    with pytest.raises(LayoutError, match="r1: 35 image tokens in the prompt, but 36 features"):
        vlm.encode(batch)
    strays = [list(made.completions[0]), [[vlm.image_token_id, 9]], made.completions[2]]
    batch = vlm.rows(made.prefixes, strays, made.inputs, ids=names)
    with pytest.raises(LayoutError, match="r1: 1 image tokens in a completion"):
        vlm.encode(batch)


def test_the_tower_runs_once_for_each_different_image(vlm: VLM) -> None:
    made = exact.case(vlm, SIZES)
    seen: list[int] = []
    hook = vlm.core.model.vision_tower.register_forward_hook(
        lambda _m, args, _o: seen.append(len(args[0]))
    )
    batch = vlm.encode(vlm.rows(made.prefixes, made.completions, made.inputs))
    assert seen == [2] and batch.image_G == (0, 1, 0)
    vlm.encode(batch)
    completion_logps(vlm.model, batch)
    hook.remove()
    assert seen == [2]


def test_a_frozen_tower_keeps_nothing_for_a_backward_pass(vlm: VLM) -> None:
    # As gradient checkpointing does: every embedding gives outputs that require gradients.
    tower = vlm.core.model.vision_tower
    made = exact.case(vlm, SIZES)
    kept: list[torch.Tensor] = []
    backward: list[int] = []
    for layer in tower.modules():
        layer.register_full_backward_hook(lambda *_: backward.append(1))
    tower.requires_grad_(False)
    tower.get_input_embeddings().register_forward_hook(lambda _m, _a, o: o.requires_grad_())
    vlm.core.model.multi_modal_projector.requires_grad_(True)
    assert not vlm.sees_frozen
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch = vlm.encode(vlm.rows(made.prefixes, made.completions, made.inputs))
    assert all(feature.requires_grad for feature in batch.features.pooler_output)
    projector = sum(p.numel() for p in vlm.core.model.multi_modal_projector.parameters())
    assert sum(t.numel() for t in kept) < 4 * projector
    sum(f.sum() for f in batch.features.pooler_output).backward()
    assert not backward
    assert vlm.core.model.multi_modal_projector.linear_1.weight.grad is not None


def test_rows_without_features_are_refused(vlm: VLM) -> None:
    made = exact.case(vlm, SIZES)
    batch = vlm.rows(made.prefixes, made.completions, made.inputs)
    with pytest.raises(ValueError, match=r"VLM\.encode"):
        completion_logps(vlm.model, batch)


def test_the_tokenizer_adds_its_bos_only_where_the_template_did_not(tiny_llava: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llava)
    assert not adds_bos(tokenizer, f"{tokenizer.bos_token}USER: hello")
    assert adds_bos(tokenizer, "USER: hello")


def test_every_family_is_listed_where_none_serves(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from mlalign.models.loading import ModelError, family_of

    with pytest.raises(ModelError) as caught:
        family_of(SimpleNamespace(architectures=["FuyuForCausalLM"]))
    for name in ("LlavaNext", "LlavaOnevision", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Idefics3"):
        assert name in str(caught.value)
    for name in ("SmolVLM", "InternVL", "Gemma3"):
        assert name in str(caught.value)
