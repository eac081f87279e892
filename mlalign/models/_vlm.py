"""A loaded model with everything that is needed to lay out its rows."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mlalign.branching.layout import LayoutError, common_prefix

MAX_RETOKENISED = 2
"""How many tokens at the prompt's end a completion may merge with before it is an error."""


@dataclass
class VLM:
    """A model, its processor and its family."""

    model: Any
    """LlavaForConditionalGeneration, or a PeftModel around it."""
    processor: Any
    family: Any
    image_mode: str = "crop"
    """"pad" or "crop"; see recipe.ModelSection."""
    name: str = ""
    """Where it was loaded from."""

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def core(self) -> Any:
        """The transformers model inside any PEFT wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """Device of the embedding."""
        return self.core.get_input_embeddings().weight.device

    @property
    def layers(self) -> list[nn.Module]:
        """Decoder blocks of the language model."""
        return list(self.family.layers(self.core))

    @property
    def image_token_id(self) -> int:
        """Placeholder id that stands once for every image token."""
        return self.family.image_token_id(self.core)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of image tokens."""
        return self.family.grid(self.processor)

    @property
    def pad_id(self) -> int:
        """The tokenizer's pad id, or its end id where it has none."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, height, width) float32 for the vision tower."""
        return self.family.pixels(self.processor, image, self.image_mode)

    def blank(self) -> Tensor:
        """Pixels of a uniform image of the processor's mean colour: after normalisation, zeros."""
        return torch.zeros_like(self.pixels(Image.new("RGB", (64, 64))))

    def patch_mask(self, box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
        """Bool (P,): image tokens that the box (pixels of an image of ``size`` (w, h)) touches."""
        return self.family.patch_mask(self.processor, box, size, self.image_mode)

    def prefix_ids(self, prompt: str) -> list[int]:
        """Ids of the chat template up to and with the assistant's header, image tokens expanded."""
        return self.family.template_ids(self.processor, [_user(prompt)], True)

    def branch_ids(
        self, prompt: str, completions: Sequence[str], name: str = "record"
    ) -> tuple[list[int], list[list[int]]]:
        """The shared prefix and what follows it in each completion, end of turn included.

        Ids are those of the chat template over prompt + completion; the prefix is the longest
        common token prefix of these and of the prompt. Raises LayoutError, naming the record,
        where the prefix ends more than two tokens before the prompt does.
        """
        prompt_ids = self.prefix_ids(prompt)
        whole = [
            self.family.template_ids(self.processor, [_user(prompt), _assistant(text)], False)
            for text in completions
        ]
        shared = common_prefix([prompt_ids, *whole])
        if shared < len(prompt_ids) - MAX_RETOKENISED:
            raise LayoutError(
                f"{name}: the prompt has {len(prompt_ids)} tokens but only {shared} of them stand "
                "before the completions: the chat template writes prompt and prompt + completion "
                "differently. Mend the chat template"
            )
        return prompt_ids[:shared], [ids[shared:] for ids in whole]

    @contextlib.contextmanager
    def adapter_off(self) -> Any:
        """The base model on the same weights, inside the context."""
        if hasattr(self.model, "get_base_model"):
            with self.model.disable_adapter():
                yield
        else:
            yield


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
