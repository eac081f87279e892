"""A local model as a writer: in order, with an image or without, the same in any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mlalign.generate import Decoding, Request, end_ids, generate
from mlalign.images import open_image
from mlalign.judges import Task, Written
from mlalign.judges.local_model import METHOD, LocalModel
from mlalign.microworld import world
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from
from mlalign.records import RecordError


@pytest.fixture(scope="module")
def vlm(tiny_llava: Path) -> VLM:
    """In float64, so that rounding does not decide between tokens."""
    loaded = load_vlm_from(tiny_llava)
    loaded.model.double()
    return loaded


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """Tasks with an image and without, mixed, texts of several lengths."""
    texts = ("Describe this image in detail.", "Is there a pot?", "What is shown in this image?")
    examples = [world.example("heldout", i) for i in range(4)]
    return [Task(f"{i}", texts[i % 3], examples[i // 2].image if i % 2 else None) for i in range(8)]


def writer(vlm: VLM, **settings: Any) -> LocalModel:
    return METHOD(METHOD.Settings(**settings), vlm=vlm)


def greedy(vlm: VLM, task: Task, tokens: int) -> str:
    """The argmax of one plain forward pass per token."""
    content = [{"type": "text", "text": task.text}]
    pixels = {}
    if task.image is not None:
        content.insert(0, {"type": "image"})
        seen = vlm.image(open_image(task.image, task.id))
        pixels["pixel_values"] = seen.tensors["pixel_values"].double()
    text = vlm.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    text = text.replace("<image>", "<image>" * 36)
    ids = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(
                int(vlm.model(input_ids=torch.tensor([ids]), **pixels).logits[0, -1].argmax())
            )
        if ids[-1] in end_ids(vlm):
            break
    return vlm.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_greedy_is_the_argmax_of_plain_forwards(vlm: VLM, tasks: list[Task]) -> None:
    written = writer(vlm).write_many(tasks, max_new_tokens=5)
    assert written == [Written(greedy(vlm, task, 5)) for task in tasks]
    # The image matters, so a batch that mixed them up would show.
    alone = [task._replace(image=None) for task in tasks]
    assert writer(vlm).write_many(alone, max_new_tokens=5) != written


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_and_order_change_nothing(vlm: VLM, tasks: list[Task], temperature: float) -> None:
    def write(some: list[Task], size: int) -> list[Written]:
        return writer(vlm, images_per_batch=size).write_many(
            some, max_new_tokens=6, temperature=temperature, seed=5
        )

    whole = write(tasks, 8)
    assert write(tasks, 3) == whole
    assert write(tasks[::-1], 2) == whole[::-1]
    assert write(tasks[3:4], 1) == whole[3:4] and write([], 1) == []


def test_samples_follow_the_seed_and_the_id(vlm: VLM, tasks: list[Task]) -> None:
    same = [tasks[0], tasks[0]._replace(id="other"), tasks[0]]

    def write(seed: int) -> list[Written]:
        return writer(vlm).write_many(same, max_new_tokens=6, temperature=1.0, seed=seed)

    one = write(5)
    assert one == write(5) and one != write(6)
    assert one[0] == one[2] != one[1]


def test_samples_of_several_requests_keep_their_places(vlm: VLM, tasks: list[Task]) -> None:
    """More samples than fit one batch, of both kinds of request."""
    decoding = Decoding(max_new_tokens=6, temperature=1.0, samples=3, seed=5)
    requests = [Request(task.id, task.image, task.text) for task in tasks[:4]]
    whole = generate(vlm, requests, decoding)
    assert generate(vlm, requests, decoding, batch_size=2) == whole
    assert [generate(vlm, [request], decoding)[0] for request in requests] == whole


def test_no_text_is_a_failure(vlm: VLM, tasks: list[Task]) -> None:
    (text,) = (w.text for w in writer(vlm).write_many(tasks[:1], max_new_tokens=1))
    assert text
    config = vlm.core.generation_config
    before = config.eos_token_id
    config.eos_token_id = [before, vlm.tokenizer(text, add_special_tokens=False)["input_ids"][0]]
    try:
        written = writer(vlm).write_many(tasks[:1], max_new_tokens=6)
    finally:
        config.eos_token_id = before
    assert written == [Written(None, "empty answer")]


def test_an_image_tag_without_an_image_is_refused(vlm: VLM) -> None:
    with pytest.raises(RecordError, match=r"'t-7', prompt: holds <image>.*give the image"):
        writer(vlm).write_many([Task("t-7", "What is <image>?")], max_new_tokens=2)


def test_the_adapter_is_off(tiny_llava: Path, tasks: list[Task]) -> None:
    from peft import LoraConfig, get_peft_model

    vlm = load_vlm_from(tiny_llava)
    plain = writer(vlm).write_many(tasks, max_new_tokens=4)
    targets = vlm.family.lora_targets(vlm.core)
    vlm.model = get_peft_model(vlm.model, LoraConfig(r=4, target_modules=targets)).eval()
    with torch.no_grad():
        for name, weight in vlm.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    requests = [Request(task.id, task.image, task.text) for task in tasks]
    texts = [text for (text,) in generate(vlm, requests, Decoding(max_new_tokens=4))]
    assert texts != [w.text for w in plain]
    assert writer(vlm).write_many(tasks, max_new_tokens=4) == plain
