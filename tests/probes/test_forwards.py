"""What the pass shows to probes is what the model computes, and no more is run than is needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mlalign.branching.attention import using
from mlalign.branching.batch import PREFIX
from mlalign.branching.logps import additive_mask, completion_logps
from mlalign.models._vlm import VLM
from mlalign.probes import _forwards
from mlalign.probes._lens import lens_of
from mlalign.probes._probe import (
    ATTENTION,
    BLANK,
    FINAL,
    GRADIENT,
    HIDDEN,
    KNOCKOUTS,
    LENS,
    NOISED,
    PROMPT_ATTENTION,
    RARE,
    SWAPPED,
    Item,
)
from mlalign.probes._records import COMPLETIONS
from tests.probes import tiny
from tests.probes.spy import Seen, Spy

VIEWS = ("image", BLANK, SWAPPED, NOISED, *KNOCKOUTS)


def spied(vlm: VLM, *needs: str, **keywords: Any) -> Seen:
    """The adapted side of a pass over one batch of two records."""
    spy = Spy(needs)
    tiny.new_pass(vlm, [spy], count=2, **keywords).run(0)
    # Before the last, which is the repeat; whether or not the base was run before it.
    return spy.watches[-2]


def real(seen: Seen, values_CSD: Tensor) -> Tensor:
    return values_CSD[seen.batch.rows.mask_CS]


def test_final_states_and_lens_give_the_log_probs_of_every_view() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    seen = spied(vlm, FINAL, LENS, *VIEWS[1:])
    assert seen.lens is not None and set(seen.last) == set(seen.views) == set(VIEWS)
    targets_M1 = seen.batch.rows.target_CS[seen.batch.rows.mask_CS][:, None]
    for view, states_CSD in seen.last.items():
        parts = list(seen.lens.log_probs(real(seen, states_CSD), normed=True))
        found_M = torch.cat(parts).gather(1, targets_M1)[:, 0]
        assert (found_M - real(seen, seen.views[view].logps_CS)).abs().max() < 1e-5, view
    assert seen.batch.lens is None, "the head is not held after the pass"
    sums = [float(logps.sum_C().sum()) for logps in seen.views.values()]
    assert len({round(each, 2) for each in sums}) == len(VIEWS), "no two views are the same"


def test_states_are_shown_only_of_views_that_are_needed() -> None:
    vlm = tiny.new_vlm()
    one, other = Spy({FINAL, BLANK}, name="one"), Spy({SWAPPED}, name="other")
    tiny.new_pass(vlm, [one, other], count=2).run(0)
    assert set(one.watches[0].last) == set(one.watches[0].views) == {"image", BLANK}
    assert set(other.watches[0].views) == {"image", SWAPPED}
    assert not other.watches[0].last and other.watches[0].lens is None


def test_the_lens_at_the_last_block_is_the_model() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    seen = spied(vlm, HIDDEN, FINAL, LENS)
    assert seen.lens is not None
    rows = seen.batch.rows
    last_RTD = seen.states[tiny.LAYERS - 1, "residual"]
    at_CSD = last_RTD[rows.row_C[:, None], rows.source_CS]
    normed = seen.lens.norm(real(seen, at_CSD))
    assert (normed - real(seen, seen.last["image"])).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_the_lens_reads_the_base_also_where_a_copy_trains(tied: bool) -> None:
    vlm = tiny.new_vlm()
    core = vlm.core
    torch.nn.init.normal_(core.model.language_model.norm.weight, 1.0, 0.3)
    if tied:
        core.lm_head.weight = core.get_input_embeddings().weight
    bare = lens_of(vlm)
    assert bare.head_VD.data_ptr() == core.lm_head.weight.data_ptr(), "no copy of the head"
    before = (core.lm_head.weight.clone(), core.model.language_model.norm.weight.clone())
    # A tied head cannot be trained apart from the embedding.
    saved = ["norm"] if tied else ["norm", "lm_head"]
    targets = r".*language_model\.layers\.\d+\.self_attn\.q_proj"
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=saved)
    vlm.model = get_peft_model(vlm.model, config).eval()
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(3)
    lens = lens_of(vlm)
    states = torch.randn(5, tiny.WIDTH)
    assert torch.equal(lens.logits(states), bare.logits(states))
    assert torch.equal(lens.head_VD, before[0])
    variance = states.square().mean(-1, keepdim=True)
    normed = before[1] * states * torch.rsqrt(variance + 1e-6)
    assert (lens.norm(states) - normed).abs().max() < 1e-5


def test_noise_is_the_same_at_every_pass_and_of_the_record() -> None:
    vlm = tiny.new_vlm()
    spies = [Spy({NOISED}), Spy({NOISED})]
    passes = [tiny.new_pass(vlm, [spy], count=2) for spy in spies]
    for step, each in enumerate(passes):
        each.run(0)
        each.run(step + 1)
    # Base and adapted are one without an adapter; every other watch is the repeat's.
    first, *others = [s.watches[i].views[NOISED].logps_CS for s in spies for i in (0, 2)]
    assert all(torch.equal(first, other) for other in others)
    items = passes[0]._batches[0].items
    assert all(i.noised is not None for i in items) and items[0].swapped is None
    gaps = [pixels(i.noised) - pixels(i.image) for i in items]
    # At step 500 a pixel keeps sqrt(0.745) of its value: noise of 0.5 of the range, clamped.
    assert not torch.equal(gaps[0], gaps[1]) and 0.5 < float(gaps[0].std()) < 2


def pixels(image: Any) -> Tensor:
    return image.tensors["pixel_values"]


def test_prompt_rows_equal_eager() -> None:
    vlm = tiny.new_vlm()
    vlm.model.double()
    seen = spied(vlm, PROMPT_ATTENTION, ATTENTION)
    rows = vlm.encode(seen.batch.rows)
    vlm.core.set_attn_implementation("eager")
    with torch.no_grad():
        weights = vlm.model(
            input_ids=rows.input_ids_RT,
            attention_mask=additive_mask(rows, torch.float64),
            position_ids=rows.position_ids,
            mm_encoder_outputs={"image": rows.features},
            output_attentions=True,
            use_cache=False,
        ).attentions
    for (kind, layer, row), rows_HQT in seen.rows.items():
        item = seen.batch.items[row]
        prompt = seen.batch.after_image(row)
        text = vlm.tokenizer.decode(rows.input_ids_RT[row, prompt])
        assert item.record.prompt.split()[0] in text and "<image>" not in text
        assert (rows.segment_RT[row, prompt] == PREFIX).all() and prompt[-1] + 1 == len(item.prefix)
        wanted = prompt if kind == "prompt" else torch.cat(seen.batch.queries(row))
        assert (rows_HQT - weights[layer][row][:, wanted]).abs().max() < 1e-6
        shifted = weights[layer][row][:, wanted - 1]
        assert (rows_HQT - shifted).abs().max() > 1e-2, "a row off by one would be seen"


def test_what_one_probe_is_shown_does_not_depend_on_another() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    alone = spied(vlm, ATTENTION)
    beside = Spy({ATTENTION})
    every = Spy({PROMPT_ATTENTION, HIDDEN, GRADIENT, FINAL, LENS, *VIEWS[1:]}, name="every")
    tiny.new_pass(vlm, [every, beside], count=2).run(0)
    assert torch.equal(alone.views["image"].logps_CS, beside.watches[-2].views["image"].logps_CS)
    for key, weights_HQT in alone.rows.items():
        assert torch.equal(weights_HQT, beside.watches[-2].rows[key])


def test_thirds_cover_every_block_once() -> None:
    for count in (1, 2, 3, 7, 32):
        thirds = [_forwards.blocks_of(view, count) for view in KNOCKOUTS[:3]]
        whole = [number for third in thirds for number in third]
        assert whole == list(range(count)) == _forwards.blocks_of(KNOCKOUTS[3], count)
    assert thirds[0] == list(range(11)) and thirds[2] == list(range(22, 32))


def test_behind_a_whole_knock_out_no_image_is_told_from_another() -> None:
    vlm = tiny.new_vlm()
    probes = tiny.new_pass(vlm, [spy := Spy({*KNOCKOUTS, SWAPPED})], count=2)
    batch = probes._batches[0]
    others: list[Item] = [replace(i, image=i.swapped) for i in batch.items if i.swapped]
    probes.run(0)
    own = spy.watches[0].views
    batch.rows = replace(batch.rows, images=vlm.family.collate([i.image for i in others]))
    probes._base.clear()
    probes.run(0)
    swapped = spy.watches[-2].views
    assert torch.equal(own[KNOCKOUTS[3]].logps_CS, swapped[KNOCKOUTS[3]].logps_CS)
    for view in ("image", *KNOCKOUTS[:3]):
        assert not torch.equal(own[view].logps_CS, swapped[view].logps_CS)


def test_gradients_equal_finite_differences() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    vlm.model.double()
    seen = spied(vlm, GRADIENT)
    assert set(seen.slopes) == set(range(len(COMPLETIONS)))
    rows = vlm.encode(seen.batch.rows)
    language = vlm.core.model.language_model

    def sums_C(inputs_RTD: Tensor) -> Tensor:
        def enter(_m: Any, args: Any, keywords: dict[str, Any]) -> Any:
            return args, {**keywords, "inputs_embeds": inputs_RTD}

        hook = language.register_forward_pre_hook(enter, with_kwargs=True)
        with torch.no_grad(), using(vlm.core):
            hidden: list[Tensor] = []
            head = vlm.core.lm_head.register_forward_pre_hook(lambda _m, a: hidden.append(a[0]))
            completion_logps(vlm.model, rows)
            head.remove()
            hook.remove()
            # Log-probs are float32 elsewhere, too coarse for a difference.
            logits = torch.nn.functional.linear(hidden[0], vlm.core.lm_head.weight)
            at_CSV = logits[rows.row_C[:, None], rows.source_CS].log_softmax(-1)
            return (at_CSV.gather(-1, rows.target_CS[..., None])[..., 0] * rows.mask_CS).sum(-1)

    torch.manual_seed(0)
    for number, (inputs_RTD, gradients_RTD) in seen.slopes.items():
        step_RTD = torch.randn_like(inputs_RTD) * 1e-4
        change_C = (sums_C(inputs_RTD + step_RTD) - sums_C(inputs_RTD - step_RTD)) / 2
        for row in range(2):
            found = float((gradients_RTD[row] * step_RTD[row]).sum())
            wanted = float(change_C[row * len(COMPLETIONS) + number])
            assert found == pytest.approx(wanted, rel=2e-4, abs=1e-6), (number, row)
        siblings = [n for n in range(1, 4) if n != number + 1]
        for sibling in siblings:
            assert gradients_RTD[rows.segment_RT == sibling].abs().max() == 0
        assert gradients_RTD[rows.segment_RT == -1].abs().max() == 0
        assert gradients_RTD[seen.batch.image_RT].abs().max() > 0


def test_gradients_leave_nothing_behind() -> None:
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    vlm.model.get_base_model().gradient_checkpointing_enable()
    vlm.model.train()
    wanted = {name: p.requires_grad for name, p in vlm.model.named_parameters()}
    hooks = len(vlm.core.model.language_model._forward_pre_hooks)
    seen = spied(vlm, GRADIENT)
    assert all(not g.requires_grad and not i.requires_grad for i, g in seen.slopes.values())
    assert wanted == {name: p.requires_grad for name, p in vlm.model.named_parameters()}
    assert all(p.grad is None for p in vlm.model.parameters()) and vlm.model.training
    assert hooks == len(vlm.core.model.language_model._forward_pre_hooks)


def test_one_graph_per_completion_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny.new_vlm()
    once = spied(vlm, GRADIENT)
    # What DeepSpeed puts on a parameter that it has sharded.
    next(iter(vlm.model.parameters())).ds_id = 0  # type: ignore[attr-defined]
    graphs = []
    graph = _forwards._graph
    monkeypatch.setattr(_forwards, "_graph", lambda *a: graphs.append(1) or graph(*a))
    each = spied(vlm, GRADIENT)
    assert len(graphs) == 2 * len(COMPLETIONS), "adapted and repeat"
    for number, (_, gradients_RTD) in once.slopes.items():
        assert torch.equal(gradients_RTD, each.slopes[number][1])


def test_rare_probes_run_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    forward = _forwards._forward
    monkeypatch.setattr(_forwards, "_forward", lambda *a: calls.append(a[3]) or forward(*a))
    vlm = tiny.with_lora(tiny.new_vlm(), b_std=0.2)
    every, rare = Spy({BLANK}, name="every"), Spy({NOISED, KNOCKOUTS[0]}, RARE, "rare")
    probes = tiny.new_pass(vlm, [every, rare], count=2)
    assert {r.probe for r in probes.run(0, rare=False)} == {"every"}
    assert calls == ["image", BLANK] * 3 and not rare.watches
    calls.clear()
    assert {r.probe for r in probes.run(1, rare=True)} == {"every", "rare"}
    # The base of the first is known; that of the other is read now, and only what it needs.
    later = ["image", NOISED, KNOCKOUTS[0]]
    assert calls == later + ["image", BLANK, *later[1:]] * 2
    calls.clear()
    probes.run(2, rare=True)
    assert calls == ["image", BLANK, *later[1:]] * 2


def test_without_an_adapter_a_rare_probe_must_see_step_0() -> None:
    probes = tiny.new_pass(tiny.new_vlm(), [Spy(), Spy(tier=RARE, name="rare")], count=2)
    probes.run(0, rare=False)
    probes.run(1, rare=False)
    with pytest.raises(ValueError, match="first probe pass of rare is at step 2 of"):
        probes.run(2)
