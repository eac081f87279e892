"""A stub of the vLLM server that TRL 1.16 talks to: its routes, before a copy of the policy.

It refuses what is out of order. Weights come by a call in the place of NCCL.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessorList
from trl.generation import vllm_client

from mlalign.generate import Decoding, GumbelNoise, _cut, _plain_config, end_ids, undisturbed
from mlalign.models._vlm import VLM
from mlalign.models.loading import load_vlm_from
from mlalign.train.engines import vllm_server


def draw(vlm: VLM, prompt: list[int], image: Image.Image, asked: dict[str, Any]) -> list[list[int]]:
    """What a server with this model answers to these sampling parameters."""
    n, seed = asked["n"], asked["seed"]
    decoding = Decoding(max_new_tokens=asked["max_tokens"], temperature=asked["temperature"])
    noise = GumbelNoise(decoding.model_copy(update={"seed": seed}), [("s", i) for i in range(n)])
    never = [int(token) for token in asked["logit_bias"]]
    ids = torch.tensor([prompt] * n)
    inputs = [vlm.image(image)] * n
    with undisturbed(vlm), torch.no_grad():
        out = vlm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_encoder_outputs={"image": vlm.features(inputs)},
            **vlm.family.generation(ids, vlm.image_token_id, inputs),
            logits_processor=LogitsProcessorList([noise]),
            generation_config=_plain_config(decoding, end_ids(vlm), vlm.pad_id, never),
        )
    return [_cut(row, end_ids(vlm)) for row in out[:, len(prompt) :].tolist()]


class Stub:
    """The server; ``vlm`` is its model, ``calls`` the routes in order."""

    def __init__(self, model: Path) -> None:
        self.vlm = load_vlm_from(model, dtype="float32")
        self.calls: list[str] = []
        self.images: list[Image.Image] = []
        self.asked: list[dict[str, Any]] = []
        self.sent: list[list[list[int]]] = []
        self.announced: list[tuple[str, str, list[int]]] = []
        self.refuse: str = ""
        """Route that is answered with HTTP 400."""
        self.url = ""
        self._lock = threading.Lock()
        self._updating = self._joined = False

    def answer(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON of a route. Raises ValueError, which is HTTP 400, for what is out of order."""
        self.calls.append(route)
        if route == self.refuse:
            raise ValueError("refused as told")
        known = {
            "/health": {},
            "/v1/models": {"data": [{"id": "tiny"}]},
            "/server_info": {"vllm_config": {"weight_transfer_config": {"backend": "nccl"}}},
            "/get_world_size": {"world_size": 1},
        }
        if route in known:
            return known[route]
        own = getattr(self, "_" + route.strip("/").replace("/", "_"), None)
        if own is None:
            raise ValueError(f"no route {route}")
        return own(**body)

    def receive(self, named: Iterator[tuple[str, torch.Tensor]]) -> None:
        """In the place of the broadcast: load what was announced, and nothing else."""
        if not (self._updating and self._joined):
            raise ValueError("weights outside of an update")
        parameters = dict(self.vlm.model.named_parameters())
        got = []
        for name, weight in named:
            got.append((name, str(weight.dtype).removeprefix("torch."), list(weight.shape)))
            parameters[name].data.copy_(weight)
        if got != self.announced:
            raise ValueError("other weights than announced")

    def _init_weight_transfer_engine(self, init_info: dict[str, Any]) -> dict[str, Any]:
        self._joined = init_info["world_size"] == 2 and init_info["rank_offset"] == 1
        return {}

    def _start_weight_update(self) -> dict[str, Any]:
        self._updating = True
        return {}

    def _update_weights(self, update_info: dict[str, Any]) -> dict[str, Any]:
        columns = (update_info[key] for key in ("names", "dtype_names", "shapes"))
        self.announced = list(zip(*columns, strict=True))
        self.ready.set()
        return {}

    def _finish_weight_update(self) -> dict[str, Any]:
        self._updating = False
        return {}

    def _reset_prefix_cache(self) -> dict[str, Any]:
        return {}

    def _v1_chat_completions_render(
        self, model: str, messages: list[Any], max_tokens: int
    ) -> dict[str, Any]:
        (part,) = messages[0]["content"]
        url = part["image_url"]["url"]
        data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
        self.images.append(Image.open(io.BytesIO(data)))
        where = {"offset": 1, "length": 3}  # of a conversation that nobody trains on
        return {
            "features": {
                "mm_hashes": {"image": ["h"]},
                "mm_placeholders": {"image": [where]},
                "kwargs_data": {"image": [url]},
            }
        }

    def _inference_v1_generate(
        self,
        request_id: str,
        model: str,
        token_ids: list[int],
        features: dict[str, Any],
        sampling_params: dict[str, Any],
    ) -> dict[str, Any]:
        (where,) = features["mm_placeholders"]["image"]
        start, stop = where["offset"], where["offset"] + where["length"]
        image_at = [i for i, token in enumerate(token_ids) if token == self.vlm.image_token_id]
        if image_at != list(range(start, stop)):
            raise ValueError("the features do not stand at the image's tokens")
        if sampling_params["top_p"] != 1.0 or sampling_params["top_k"] != 0:
            raise ValueError("not sampled from all tokens")
        url = features["kwargs_data"]["image"][0]
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        with self._lock:
            self.asked.append(sampling_params)
            found = draw(self.vlm, token_ids, image.convert("RGB"), sampling_params)
            self.sent.append(found)
        return {"choices": [{"token_ids": ids, "logprobs": None} for ids in found]}

    @contextlib.contextmanager
    def running(self, patch: pytest.MonkeyPatch) -> Iterator[Stub]:
        """Listening, with TRL's client told that vllm is there and NCCL replaced."""
        stub = self
        self.ready = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({})

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                self.reply(json.loads(self.rfile.read(size) or b"{}"))

            def reply(self, body: dict[str, Any]) -> None:
                code, out = 200, {}
                try:
                    out = stub.answer(self.path.partition("?")[0], body)
                except (ValueError, TypeError) as error:
                    code, out = 400, {"error": str(error)}
                data = json.dumps(out).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Transfer:
            @staticmethod
            def trainer_init(info: dict[str, Any]) -> Any:
                return SimpleNamespace(group=SimpleNamespace(), info=info)

            @staticmethod
            def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
                assert stub.ready.wait(30)
                stub.ready.clear()
                stub.receive(iterator)

        for name, value in {
            "is_vllm_available": lambda *args, **kwargs: True,
            "get_ip": lambda: "127.0.0.1",
            "NCCLWeightTransferEngine": Transfer,
            "NCCLTrainerSendWeightsArgs": SimpleNamespace,
        }.items():
            patch.setattr(vllm_client, name, value, raising=False)
        patch.setattr(vllm_server, "communicator_device", lambda vlm: torch.device("cuda"))
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
