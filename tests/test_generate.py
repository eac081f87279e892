"""Generated text depends on the record and the seed alone; nothing of the model is left changed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from mlalign.generate import (
    Decoding,
    GumbelNoise,
    Request,
    end_ids,
    generate,
    nucleus,
    row_seed,
)
from mlalign.microworld import world
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from
from mlalign.records import ImageRef, RecordError

PROMPTS = ("Describe this image in detail.", "Is there a pot in the image?", "What is shown?")
SAMPLED = Decoding(max_new_tokens=6, temperature=1.0, samples=3, seed=5)


@pytest.fixture(scope="module")
def vlm(tiny_llava: Path) -> VLM:
    """In float64, so that rounding does not decide between tokens."""
    loaded = load_vlm_from(tiny_llava)
    loaded.model.double()
    return loaded


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    examples = [world.example("heldout", i) for i in range(5)]
    return [Request(e.id, e.image, PROMPTS[i % 3]) for i, e in enumerate(examples)]


def test_greedy_is_the_argmax_of_a_plain_forward(vlm: VLM, requests: list[Request]) -> None:
    from mlalign.images import open_image

    texts = generate(vlm, requests, Decoding(max_new_tokens=5), batch_size=5)
    for request, (text,) in zip(requests, texts, strict=True):
        pixels = vlm.image(open_image(request.image, request.id)).tensors["pixel_values"].double()
        ids = vlm.prefix_ids(request.prompt, (96, 96))
        start = len(ids)
        for _ in range(5):
            with torch.no_grad():
                out = vlm.model(input_ids=torch.tensor([ids]), pixel_values=pixels)
            ids.append(int(out.logits[0, -1].argmax()))
            if ids[-1] in end_ids(vlm):
                break
        assert vlm.tokenizer.decode(ids[start:], skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=6), SAMPLED])
def test_batches_and_order_change_nothing(
    vlm: VLM, requests: list[Request], decoding: Decoding
) -> None:
    whole = generate(vlm, requests, decoding, batch_size=32)
    assert [len(texts) for texts in whole] == [decoding.samples] * len(requests)
    assert generate(vlm, requests, decoding, batch_size=2) == whole
    assert generate(vlm, requests[::-1], decoding, batch_size=4) == whole[::-1]
    assert generate(vlm, requests[3:4], decoding, batch_size=1) == whole[3:4]


def test_samples_differ_and_follow_the_seed(vlm: VLM, requests: list[Request]) -> None:
    one = generate(vlm, requests, SAMPLED)
    assert one == generate(vlm, requests, SAMPLED)
    assert one != generate(vlm, requests, SAMPLED.model_copy(update={"seed": 6}))
    assert all(len(set(texts)) == 3 for texts in one)


def test_fewer_samples_are_the_first_ones(vlm: VLM, requests: list[Request]) -> None:
    two = SAMPLED.model_copy(update={"samples": 2})
    assert generate(vlm, requests, two) == [t[:2] for t in generate(vlm, requests, SAMPLED)]


def test_draws_follow_the_softmax() -> None:
    """Ten thousand draws from a skewed distribution, by the chi-squared test."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    decoding = Decoding(temperature=0.7, seed=1)
    noise = GumbelNoise(decoding, [(f"r{i}", 0) for i in range(10_000)])
    drawn = noise(torch.zeros(1), logits.expand(10_000, 5)).argmax(-1)
    counts = torch.bincount(drawn, minlength=5).numpy()
    expected = (logits / 0.7).softmax(-1).double().numpy()
    assert stats.chisquare(counts, 10_000 * expected / expected.sum()).pvalue > 0.001


def test_nucleus_keeps_the_smallest_set() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = {p: (nucleus(logits, p) > -math.inf).tolist()[0] for p in (1e-6, 0.45, 0.79, 0.81, 1.0)}
    assert kept[1e-6] == kept[0.45] == [True, False, False, False]
    assert kept[0.79] == [True, True, False, False]
    assert kept[0.81] == [True, True, True, False]
    assert kept[1.0] == [True, True, True, True]


def test_end_of_turn_stops_a_text(vlm: VLM, requests: list[Request]) -> None:
    (text,) = generate(vlm, requests[:1], Decoding(max_new_tokens=6))[0]
    first = vlm.tokenizer(text, add_special_tokens=False)["input_ids"][0]
    config = vlm.core.generation_config
    before = config.eos_token_id
    config.eos_token_id = [before, first]
    try:
        assert generate(vlm, requests[:1], Decoding(max_new_tokens=6)) == [[""]]
    finally:
        config.eos_token_id = before


def test_modes_and_random_state_are_left_alone(vlm: VLM, requests: list[Request]) -> None:
    vlm.model.train()
    vlm.core.model.vision_tower.eval()
    modes = [m.training for m in vlm.model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    generate(vlm, requests[:2], SAMPLED)
    assert [m.training for m in vlm.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    vlm.model.eval()


def test_the_checkpoint_s_own_settings_are_not_used(vlm: VLM, requests: list[Request]) -> None:
    plain = generate(vlm, requests, Decoding(max_new_tokens=6))
    config = vlm.core.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size = 5.0, 1
    try:
        assert generate(vlm, requests, Decoding(max_new_tokens=6)) == plain
    finally:
        config.repetition_penalty, config.no_repeat_ngram_size = None, None


def test_with_an_adapter(tiny_llava: Path, requests: list[Request]) -> None:
    from peft import LoraConfig, get_peft_model

    vlm = load_vlm_from(tiny_llava)
    plain = generate(vlm, requests, Decoding(max_new_tokens=4))
    targets = vlm.family.lora_targets(vlm.core)
    vlm.model = get_peft_model(vlm.model, LoraConfig(r=4, target_modules=targets)).eval()
    assert generate(vlm, requests, Decoding(max_new_tokens=4)) == plain
    with torch.no_grad():
        for name, weight in vlm.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    assert generate(vlm, requests, Decoding(max_new_tokens=4)) != plain
    with vlm.adapter_off():
        assert generate(vlm, requests, Decoding(max_new_tokens=4)) == plain


def test_refusals(vlm: VLM) -> None:
    missing = Request("record-7", ImageRef(path="/nowhere/x.png"), "Describe.")
    with pytest.raises(RecordError, match="record-7"):
        generate(vlm, [missing], Decoding())
    with pytest.raises(ValueError, match="set a temperature"):
        generate(vlm, [missing], Decoding(samples=2))
    assert generate(vlm, [], Decoding()) == []


def test_row_seeds() -> None:
    seeds = {row_seed(s, r, n) for s in range(3) for r in ("a", "b", "a1") for n in range(12)}
    assert len(seeds) == 3 * 3 * 12
    assert all(0 <= seed < 2**63 for seed in seeds)
