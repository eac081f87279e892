"""Sampling by a vLLM server that holds a copy of the policy, through TRL's VLLMClient (TRL 1.16).

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}'
        [--enable-scale-out, from vLLM 0.30]
    engine: {name: vllm_server, url: "http://localhost:8000"}

MODEL is ``model.path``. Before each sampling the main process sends what has changed, the weights
under an adapter with the adapter added (``_merged``), and clears the server's prefix cache. An
image goes to the server once per sampling, as a PNG data URL, is prepared there by the server's own
processor, and comes back as features; a prompt goes as the token ids that are trained on, with the
features placed at its image tokens. The seed of a request is made of (run's seed, step, record);
its samples' are the server's affair.

Not corrected is that the server's log-probs differ by rounding from those of the trained model:
what is trained on are the latter.

Run so far against a stub of this protocol only (``tests/train/test_vllm_server.py``), not against
vLLM: there the HTTP half of TRL's client is real, and the transfer over NCCL is replaced. That half
needs vllm in the trainer's environment and a CUDA device of its own beside the server's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from pydantic import BaseModel, ConfigDict, Field, field_validator
from trl.generation import vllm_client

from mlalign.generate import Decoding, Request, row_seed
from mlalign.images import open_image
from mlalign.models._vlm import VLM
from mlalign.train.engines._merged import changed_weights

NEVER = -100.0
"""Bias on the logit of a token that may not be sampled: vLLM's least."""


class EngineError(RuntimeError):
    """The server cannot sample for this run. The message says what to mend."""


class Settings(BaseModel):
    """Where the server is."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: str
    """Its address without /v1, e.g. http://localhost:8000."""
    timeout: float = Field(default=240.0, ge=0)
    """Seconds to wait for it when training begins."""
    group_port: int = Field(default=51216, ge=1, le=65535)
    """Port of this machine through which weights are sent."""
    concurrency: int = Field(default=32, ge=1)
    """Prompts under way at once."""

    @field_validator("url")
    @classmethod
    def _is_root(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")) or value.rstrip("/").endswith("/v1"):
            raise ValueError("give the server's root, e.g. http://localhost:8000")
        return value.rstrip("/")


class VllmServer:
    """The engine. It connects when it first samples."""

    Settings = Settings

    def __init__(self, settings: Settings, vlm: VLM) -> None:
        """Raises EngineError where vllm is not installed, or the policy is not on a GPU."""
        self.settings, self.vlm = settings, vlm
        self._client: Any = None
        if not vllm_client.is_vllm_available():
            raise EngineError("engine vllm_server: pip install vllm in the trainer's environment")

    def sample(
        self, requests: Sequence[Request], decoding: Decoding, batch_size: int
    ) -> list[list[list[int]]]:
        """``[request][sample]``. ``batch_size`` is the server's affair.

        Raises EngineError where the server is down, refuses, or gives what was not asked for.
        """
        answers: list[list[list[int]]] = []
        # In two steps: nobody asks before the weights are there, nor waits for a process that fell.
        with self._together():
            client = self._connected()
            if PartialState().is_main_process:
                self._send_weights(client)
        with self._together():
            answers = self._ask(client, requests, decoding)
        return answers

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """What fails on one process fails on all of them, once all are through."""
        fault, cause = "", None
        try:
            yield
        # TRL's client raises plain Exceptions for what a server refuses.
        except Exception as error:
            fault, cause = str(error) or type(error).__name__, error
        faults = [each for each in gather_object([fault]) if each]
        if faults:
            raise EngineError(f"engine.url {self.settings.url}: {faults[0]}") from cause

    def _connected(self) -> Any:
        if self._client is None:
            own = self.settings
            client = vllm_client.VLLMClient(
                base_url=own.url, group_port=own.group_port, connection_timeout=own.timeout
            )
            if PartialState().is_main_process:
                client.init_communicator(device=communicator_device(self.vlm))
            self._client = client
        return self._client

    def _send_weights(self, client: Any) -> None:
        """The weights that training has changed, as they are with the adapter added."""
        facts = [
            (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
            for name, weight in changed_weights(self.vlm.model, shapes_only=True)
        ]
        client.update_named_params(facts, changed_weights(self.vlm.model))
        client.reset_prefix_cache()

    def _ask(
        self, client: Any, requests: Sequence[Request], decoding: Decoding
    ) -> list[list[list[int]]]:
        images = [None if r.image is None else [open_image(r.image, r.id)] for r in requests]
        features = client.image_features(images)
        prompts = [
            self.vlm.prefix_ids(request.prompt, image[0].size)
            for request, image in zip(requests, images, strict=True)
            if image is not None
        ]
        if len(prompts) < len(requests):
            raise EngineError("engine vllm_server samples answers to images only")
        token = self.vlm.image_token_id

        def one(index: int) -> list[list[int]]:
            request, prompt = requests[index], prompts[index]
            found = client.generate(
                [prompt],
                [placed(features[index], prompt, token, request.id)],
                n=decoding.samples,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                max_tokens=decoding.max_new_tokens,
                generation_kwargs={
                    "seed": row_seed(decoding.seed, request.id, 0) >> 32,
                    "logit_bias": {str(token): NEVER},
                },
            )["completion_ids"]
            return self._checked(found, request.id, decoding)

        with ThreadPoolExecutor(min(self.settings.concurrency, len(requests))) as pool:
            return list(pool.map(one, range(len(requests))))

    def _checked(self, found: Any, record: str, decoding: Decoding) -> list[list[int]]:
        if len(found) != decoding.samples:
            raise EngineError(f"record {record!r}: {len(found)} answers of {decoding.samples}")
        for ids in found:
            if not 0 < len(ids) <= decoding.max_new_tokens:
                raise EngineError(f"record {record!r}: an answer of {len(ids)} tokens")
            if self.vlm.image_token_id in ids:
                raise EngineError(f"record {record!r}: an answer holds an image token")
        return found


METHOD = VllmServer


def placed(features: Any, prompt: Sequence[int], token: int, record: str) -> dict[str, Any]:
    """Features of one image, told where its tokens stand in the prompt that they go with.

    The server says where they stood in the conversation that it was sent the image in. Raises
    EngineError where the prompt has another number of runs of image tokens than the server.
    """
    runs, offset = [], 0
    for is_image, group in groupby(prompt, key=lambda each: each == token):
        length = len(list(group))
        if is_image:
            runs.append({"offset": offset, "length": length})
        offset += length
    known = (features or {}).get("mm_placeholders", {}).get("image", [])
    if not runs or len(runs) != len(known):
        raise EngineError(
            f"record {record!r}: {len(runs)} runs of image tokens here, {len(known)} at the "
            "server: serve the model of model.path"
        )
    return {**features, "mm_placeholders": {**features["mm_placeholders"], "image": runs}}


def communicator_device(vlm: VLM) -> torch.device:
    """The policy's GPU. Raises EngineError where it is on none: weights go over NCCL."""
    if vlm.device.type != "cuda":
        raise EngineError(
            "engine vllm_server sends weights over NCCL, which needs the policy on a GPU, and a "
            "second one for the server. Use engine: transformers"
        )
    return vlm.device
