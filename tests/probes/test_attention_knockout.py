"""Planted truths, a reference by hand and invariances of attention_knockout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from mlalign.models._vlm import VLM
from mlalign.objects import vocabulary
from mlalign.probes._pass import ProbePass
from mlalign.probes._probe import Item
from mlalign.probes._records import COMPLETIONS
from mlalign.probes.attention_knockout import METHOD
from tests.probes import tiny

# The tiny model has three blocks: each third is one.
BLOCKS = {"early": (0,), "middle": (1,), "late": (2,), "all": (0, 1, 2)}


def without_attention(vlm: VLM, layers: Sequence[int]) -> VLM:
    """Blocks whose attention writes nothing."""
    with torch.no_grad():
        for layer in layers:
            vlm.layers[layer].self_attn.o_proj.weight.zero_()  # type: ignore[union-attr]
    return vlm


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_the_only_block_that_reads_the_image_is_found(reads: int) -> None:
    vlm = without_attention(tiny.new_vlm(), [layer for layer in range(3) if layer != reads])
    readings = tiny.run(vlm, METHOD())
    drops = {
        name: [r.value for r in tiny.pick(readings, metric=f"drop_{name}", side="adapted")]
        for name in BLOCKS
    }
    assert min(map(abs, drops["all"])) > 1e-2
    for name, layers in BLOCKS.items():
        wanted = drops["all"] if reads in layers else [0.0] * len(drops["all"])
        assert drops[name] == pytest.approx(wanted, abs=1e-3), name


def test_with_all_blocks_hidden_pixels_do_not_matter() -> None:
    vlm = tiny.new_vlm()
    records = tiny.records(3)
    images = [record.image for record in records]
    moved = [
        replace(record, image=image)
        for record, image in zip(records, images[1:] + images[:1], strict=True)
    ]
    own, other = (
        ProbePass(vlm, each, [METHOD()], vocabulary("microworld"), 2).run(0)
        for each in (records, moved)
    )
    for record in records:
        fixed = {"record": record.id, "side": "adapted"}
        with_all = [tiny.one(each, "margin_all", **fixed).value for each in (own, other)]
        early = [tiny.one(each, "margin_early", **fixed).value for each in (own, other)]
        assert with_all[0] == pytest.approx(with_all[1], abs=1e-4)
        assert abs(early[0] - early[1]) > 1e-3


def logps_by_hand(vlm: VLM, item: Item, completion: list[int], hidden: Sequence[int]) -> Any:
    """Per token, from a forward in which these blocks are handed another mask by a hook."""
    ids = torch.tensor([item.prefix + completion])
    image_T = ids[0] == vlm.image_token_id
    causal_TT = torch.ones(len(ids[0]), len(ids[0]), dtype=torch.bool).tril()
    blind_TT = causal_TT & ~(image_T[None, :] & ~image_T[:, None])

    def masked(module: Any, args: Any, keywords: Any) -> Any:
        seen_TT = blind_TT if module.layer_idx in hidden else causal_TT
        mask = torch.zeros(seen_TT.shape).masked_fill(~seen_TT, float("-inf"))
        return args, {**keywords, "attention_mask": mask[None, None]}

    hooks = [
        layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True)  # type: ignore[union-attr]
        for layer in vlm.layers
    ]
    try:
        with torch.no_grad():
            logits = vlm.model(input_ids=ids, pixel_values=item.image.tensors["pixel_values"])
    finally:
        for hook in hooks:
            hook.remove()
    logps = logits.logits[0, len(item.prefix) - 1 : -1].double().log_softmax(-1)
    return logps.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def test_equals_forwards_by_hand() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [METHOD()])
    readings = probes.run(0)
    item = probes._batches[0].items[1]
    assert item.image.tensors["pixel_values"].ndim == 4
    vlm.core.set_attn_implementation({"text_config": "eager"})
    for k, (completion, group) in enumerate(zip(item.completions, COMPLETIONS, strict=True)):
        seen_S = logps_by_hand(vlm, item, completion, ())
        for name, layers in BLOCKS.items():
            drop_S = seen_S - logps_by_hand(vlm, item, completion, layers)
            fixed = {"record": item.record.id, "side": "adapted"}
            found = tiny.one(readings, f"drop_{name}", group=group, **fixed).value
            assert abs(float(drop_S.sum())) > 1e-3
            assert found == pytest.approx(float(drop_S.sum()), abs=1e-3)
            per_token = tiny.one(readings, f"drop_{name}_per_token", group=group, **fixed).value
            assert per_token == pytest.approx(found / len(completion), abs=1e-9)
            if group == "rejected":
                absent = next(m for m in item.mentions[k] if not m.real)
                word = tiny.one(readings, f"drop_{name}_per_token", group="absent", **fixed).value
                assert word == pytest.approx(float(drop_S[list(absent.tokens)].mean()), abs=1e-3)


def test_batches_do_not_matter_and_delta_is_above_the_floor() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone, together = (tiny.run(vlm, METHOD(), batch_size=size) for size in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-3, nan_ok=True), one
    delta = tiny.one(together, "drop_all", side="delta", group="own")
    sides = [tiny.one(together, "drop_all", side=s, group="own").value for s in ("base", "adapted")]
    assert delta.value == pytest.approx(sides[1] - sides[0], abs=1e-9)
    assert abs(delta.value) > 1e-2 and delta.noise < 1e-3


def test_a_model_whose_attention_is_not_the_projects_is_refused() -> None:
    vlm = tiny.new_vlm()
    vlm.core.config.get_text_config().attn_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"attention_knockout.*soft-capped"):
        tiny.new_pass(vlm, [METHOD()])
