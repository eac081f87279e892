"""The vLLM engine against a stub of the server's protocol; vLLM itself is not run here.

TRL's own client speaks to the stub over HTTP. What is replaced is the transfer over NCCL.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mlalign import methods, store
from mlalign.generate import Decoding, Request, row_seed
from mlalign.images import open_image
from mlalign.microworld import world
from mlalign.recipe import configure, from_dict
from mlalign.runlog import read_lines
from mlalign.train.engines._merged import changed_weights
from mlalign.train.engines.vllm_server import EngineError, Settings, VllmServer, placed
from mlalign.train.rollouts import Sampling
from tests.train.test_group_trainer import adapted
from tests.train.vllm_stub import Stub, draw

DECODING = Decoding(max_new_tokens=8, temperature=0.7, samples=3, seed=5)
JOIN = ["/server_info", "/get_world_size", "/init_weight_transfer_engine"]
PUSH = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]


@pytest.fixture
def stub(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with Stub(tiny_llava).running(monkeypatch) as server:
        yield server


def asked_for(count: int) -> list[Request]:
    examples = [world.example("pairs", i) for i in range(count)]
    return [Request(e.id, e.image, e.prompt) for e in examples]


def expected(vlm: Any, request: Request) -> list[list[int]]:
    """The answers of the policy itself, to what the server should have been asked."""
    assert request.image is not None
    image = open_image(request.image, request.id)
    asked = {
        "n": 3,
        "seed": row_seed(5, request.id, 0) >> 32,
        "max_tokens": 8,
        "temperature": 0.7,
        "logit_bias": {str(vlm.image_token_id): -100.0},
    }
    return draw(vlm, vlm.prefix_ids(request.prompt, image.size), image, asked)


def test_answers_are_those_of_the_policy_of_this_moment(stub: Stub, tiny_llava: Path) -> None:
    vlm = adapted(tiny_llava)
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    engine, requests = VllmServer(Settings(url=stub.url), vlm), asked_for(2)
    found = engine.sample(requests, DECODING, batch_size=64)
    assert found == [expected(vlm, request) for request in requests]
    assert stub.calls[:2] == ["/health", "/v1/models"] and stub.calls[2:9] == [*JOIN, *PUSH]
    assert (
        sorted(stub.calls[9:])
        == ["/inference/v1/generate"] * 2 + ["/v1/chat/completions/render"] * 2
    )
    for request in requests:
        assert request.image is not None
        own = open_image(request.image, request.id)
        assert any(own.tobytes() == image.tobytes() for image in stub.images)
    # The policy itself is as it was, to the bit.
    after = vlm.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())

    # A step later the server is told first, and answers otherwise.
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name))
            )
    stub.calls.clear()
    again = engine.sample(requests, DECODING, batch_size=64)
    assert stub.calls[:4] == PUSH
    assert again == [expected(vlm, request) for request in requests] and again != found


def test_what_is_sent_is_what_peft_merges(tiny_llava: Path) -> None:
    vlm = adapted(tiny_llava)
    merged = dict(copy.deepcopy(vlm.model).merge_and_unload().named_parameters())
    base = dict(vlm.model.get_base_model().named_parameters())
    sent = dict(changed_weights(vlm.model))
    for name, weight in sent.items():
        torch.testing.assert_close(weight, merged[name], atol=1e-6, rtol=0)
    left = [name for name in merged if name not in sent]
    for name in left:
        assert torch.equal(merged[name], base[name]), name
    shapes = {n: (w.dtype, w.shape) for n, w in changed_weights(vlm.model, shapes_only=True)}
    assert shapes == {n: (w.dtype, w.shape) for n, w in sent.items()} and len(sent) > 4


def test_a_run_sends_its_weights_before_every_rollout(
    stub: Stub, tiny_llava: Path, tmp_path: Path
) -> None:
    steps, group = 2, 3
    raw: dict[str, Any] = {
        "name": "run",
        "model": {"path": str(tiny_llava), "dtype": "float32", "adapter": {"rank": 4}},
        "data": {"source": "microworld", "vocabulary": "microworld", "prompts": 4},
        "train": {
            "algorithm": {
                "name": "grpo",
                "group": group,
                "max_new_tokens": 8,
                "temperature": 0.9,
                "beta": 0.0,
                "rewards": [{"name": "object_checker", "right": 1.0}],
                "engine": {"name": "vllm_server", "url": stub.url, "timeout": 5},
            },
            "learning_rate": 1e-2,
            "batch_size": 2,
            "micro_batch_size": 2,
            "steps": steps,
            "schedule": "constant",
        },
        "launch": {"launcher": "none", "processes": 1, "zero": 0},
    }
    run = tmp_path / "runs/run"
    store.write_examples(run / "data/grpo", [world.example("pairs", i) for i in range(4)], {})
    recipe = from_dict(raw)
    ref = recipe.train.algorithm
    method = methods.find("mlalign.train.algorithms", ref.name)
    trainer = method(configure(method, ref, "train.algorithm")).train(recipe, "grpo", run)
    order = [call for call in stub.calls if call in ("/update_weights", "/inference/v1/generate")]
    assert order == (["/update_weights"] + ["/inference/v1/generate"] * 2) * steps
    assert all(asked["n"] == group and asked["temperature"] == 0.9 for asked in stub.asked)
    assert len({asked["seed"] for asked in stub.asked}) == 2 * steps
    logged = sorted(line["tokens"] for line in read_lines(run / "rollouts.jsonl"))
    assert logged == sorted(len(ids) for answers in stub.sent for ids in answers)
    # The server has the policy of the last rollout: neither the first one nor the one after it.
    served = dict(stub.vlm.model.named_parameters())
    final = dict(changed_weights(trainer.vlm.model))
    base = dict(trainer.vlm.model.get_base_model().named_parameters())
    moved = [float((served[name] - final[name]).detach().abs().max()) for name in final]
    frozen = {name: base[name.removesuffix("weight") + "base_layer.weight"] for name in final}
    started = [float((served[n] - frozen[n]).detach().abs().max()) for n in final]
    assert max(moved) > 1e-5 and max(started) > 1e-5


def test_what_the_server_does_not_do_stops_with_its_address(stub: Stub, tiny_llava: Path) -> None:
    vlm = adapted(tiny_llava)
    engine = VllmServer(Settings(url=stub.url), vlm)
    for route in ("/v1/chat/completions/render", "/inference/v1/generate", "/update_weights"):
        stub.refuse = route
        if route == "/update_weights":
            stub.ready.set()  # nothing will be announced: the transfer must not wait for it
        with pytest.raises(EngineError, match=rf"engine\.url {stub.url}: "):
            engine.sample(asked_for(1), DECODING, 1)
    stub.refuse = ""
    stub._inference_v1_generate = lambda **keys: {  # type: ignore[method-assign]
        "choices": [{"token_ids": [5], "logprobs": None}]
    }
    stub.ready.clear()
    with pytest.raises(EngineError, match=r"record 'microworld-pairs-0': 1 answers of 3"):
        engine.sample(asked_for(1), DECODING, 1)


def test_a_server_that_is_not_there(stub: Stub, tiny_llava: Path) -> None:
    gone = VllmServer(Settings(url="http://127.0.0.1:9", timeout=0), adapted(tiny_llava))
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9: .*can't be reached"):
        gone.sample(asked_for(1), DECODING, 1)


def test_features_stand_where_the_image_is() -> None:
    known = {"mm_placeholders": {"image": [{"offset": 1, "length": 3}]}, "mm_hashes": {}}
    found = placed(known, [7, 7, 9, 9, 9, 7], 9, "r")
    assert found["mm_placeholders"]["image"] == [{"offset": 2, "length": 3}]
    assert known["mm_placeholders"]["image"] == [{"offset": 1, "length": 3}]
    with pytest.raises(EngineError, match="record 'r': 2 runs of image tokens here, 1 at the"):
        placed(known, [9, 7, 9], 9, "r")


def test_what_cannot_be_is_refused_before_training(tiny_llava: Path) -> None:
    vlm = adapted(tiny_llava)
    with pytest.raises(EngineError, match="pip install vllm"):
        VllmServer(Settings(url="http://localhost:8000"), vlm)
    with pytest.raises(ValidationError, match="the server's root"):
        Settings(url="http://localhost:8000/v1")
    for engine, problem in {
        "vllm": "There are: transformers, vllm_server",
        "vllm_server": "train.algorithm.engine 'vllm_server':\n.*url",
    }.items():
        with pytest.raises(ValidationError, match=problem):
            Sampling.model_validate({"engine": engine})
