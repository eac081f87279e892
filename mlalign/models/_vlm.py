"""A loaded model with everything that is needed to lay out its rows."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mlalign.branching.batch import PrefixBatch
from mlalign.branching.layout import LayoutError, common_prefix, lay_out
from mlalign.models import _vision
from mlalign.models._adapters import adapter_in_place
from mlalign.models._family import ImageInputs, adds_bos

MAX_RETOKENISED = 2
"""How many tokens at the prompt's end a completion may merge with before it is an error."""


@dataclass
class VLM:
    """A model, its processor and its family."""

    model: Any
    """A transformers vision-language model, or a PeftModel around it."""
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

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the image tokens of an image of ``size`` (w, h)."""
        return self.family.grid(self.processor, size)

    @property
    def pad_id(self) -> int:
        """The tokenizer's pad id, or its end id where it has none."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def image(self, image: Image.Image) -> ImageInputs:
        """One image as the vision tower takes it."""
        return self.family.inputs(self.processor, image, self.image_mode)

    def blank(self, like: ImageInputs | None = None) -> ImageInputs:
        """A uniform image of the processor's mean colour, in the layout of ``like``: zeros."""
        return self.family.blank(self.image(Image.new("RGB", (64, 64))) if like is None else like)

    def patch_mask(self, box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
        """Bool (P,): image tokens that the box (pixels of an image of ``size`` (w, h)) touches."""
        return self.family.patch_mask(self.processor, box, size, self.image_mode)

    def prefix_ids(self, prompt: str, size: tuple[int, int]) -> list[int]:
        """Ids of the chat template up to and with the assistant's header, image tokens expanded
        for an image of ``size`` (w, h)."""
        return self.family.template_ids(self.processor, [_user(prompt)], True, size)

    def branch_ids(
        self,
        prompt: str,
        completions: Sequence[str],
        size: tuple[int, int],
        name: str = "record",
    ) -> tuple[list[int], list[list[int]]]:
        """The shared prefix and what follows it in each completion, end of turn included.

        Ids are those of the chat template over prompt + completion; the prefix is the longest
        common token prefix of these and of the prompt. Raises LayoutError, naming the record,
        where the prefix ends more than two tokens before the prompt does.
        """
        prompt_ids = self.prefix_ids(prompt, size)
        whole = [
            self.family.template_ids(self.processor, [_user(prompt), _assistant(text)], False, size)
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

    def token_spans(
        self, prompt: str, completion: str, size: tuple[int, int], name: str = "record"
    ) -> list[tuple[int, int]]:
        """Characters [start, end) of ``completion`` that each token of the whole template stands
        for, last token last. Tokens of the prompt come out below 0, those behind it (end of turn)
        as empty spans at its end or later.

        Raises LayoutError, naming the record, where the template rewrites the text, or where the
        tokenizer is a slow one, which keeps no offsets.
        """
        if not self.tokenizer.is_fast:
            raise LayoutError(
                f"{name}: segments need a fast tokenizer; {self.tokenizer.__class__.__name__} "
                "does not say which characters a token stands for"
            )
        messages = [_user(prompt), _assistant(completion)]
        text = self.family.template_text(self.processor, messages, False, size)
        start = text.rfind(completion)
        if start < 0:
            # Many templates trim what they are given.
            start = text.rfind(completion.strip())
            start -= len(completion) - len(completion.lstrip())
            if completion.strip() not in text:
                raise LayoutError(
                    f"{name}: the chat template rewrites the answer, so its segments cannot be "
                    "found in it. Mend the chat template"
                )
        bos = adds_bos(self.tokenizer, text)
        found = self.tokenizer(text, add_special_tokens=bos, return_offsets_mapping=True)
        return [(a - start, b - start) for a, b in found["offset_mapping"]]

    def question_ids(
        self, prompts: Sequence[str], size: tuple[int, int]
    ) -> tuple[list[int], list[list[int]]]:
        """Several prompts on one image: what their templates share, and what follows in each.

        At least one token is left to each, also where only one is asked: the answer follows it.
        """
        ids = [self.prefix_ids(prompt, size) for prompt in prompts]
        shared = min(common_prefix(ids), min(map(len, ids)) - 1)
        return ids[0][:shared], [each[shared:] for each in ids]

    @property
    def max_positions(self) -> int:
        """Tokens that the language model has positions for."""
        return int(self.core.config.get_text_config().max_position_embeddings)

    def rows(
        self,
        prefixes: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        images: Sequence[ImageInputs],
        *,
        rows: Sequence[Sequence[int]] | None = None,
        ids: Sequence[Sequence[str]] = (),
        sides: Sequence[Sequence[str]] = (),
    ) -> PrefixBatch:
        """Rows of prefixes and their completions, each prefix with its image (``lay_out``).

        The same ImageInputs object given twice is encoded once. Raises LayoutError, naming the
        record, where a prefix and completion are longer than the model has positions, and where the
        family cannot lay positions because image and image tokens do not fit.
        """
        different = list({id(image): image for image in images}.values())
        place = {id(image): number for number, image in enumerate(different)}
        self._check_length(prefixes, completions, ids)
        positions = self._positions(prefixes, images, ids)
        batch = lay_out(
            prefixes,
            completions,
            pad_id=self.pad_id,
            images=self.family.collate(different),
            image_of=[place[id(image)] for image in images],
            positions=None if positions[0] is None else positions,
            rows=rows,
            ids=ids,
            sides=sides,
        )
        return _vision.with_masks(self.core, self.family, batch)

    def encode(self, batch: PrefixBatch, model: nn.Module | None = None) -> PrefixBatch:
        """The batch with image features: one tower call for all of its different images.

        ``model``: whose tower and projector to use (None: this one's); a frozen tower is run
        without gradient and keeps nothing. Features that are there already stay. Raises
        LayoutError, naming the record, where image tokens and features do not match.
        """
        return _vision.encode(self.core if model is None else model, self.family, batch)

    def features(self, images: Sequence[ImageInputs]) -> Any:
        """Features of one image per row, as ``mm_encoder_outputs["image"]``; no gradient.

        The same ImageInputs object given twice is encoded once.
        """
        different = list({id(image): image for image in images}.values())
        place = {id(image): number for number, image in enumerate(different)}
        with torch.no_grad():
            found = _vision.features(self.core, self.family, self.family.collate(different))
        return self.family.arrange(found, [place[id(image)] for image in images])

    @property
    def sees_frozen(self) -> bool:
        """Whether nothing between pixels and language model trains: then policy and reference
        share the features of an image."""
        return _vision.frozen(self.core, self.family)

    def _positions(
        self,
        prefixes: Sequence[Sequence[int]],
        images: Sequence[ImageInputs],
        ids: Sequence[Sequence[str]],
    ) -> list[Any]:
        found = []
        for number, (prefix, image) in enumerate(zip(prefixes, images, strict=True)):
            try:
                found.append(self.family.positions(self.core, prefix, image))
            except LayoutError as error:
                name = ids[number][0] if ids and ids[number] else f"row {number}"
                raise LayoutError(f"{name}: {error}") from error
        return found

    def _check_length(
        self,
        prefixes: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        ids: Sequence[Sequence[str]],
    ) -> None:
        for number, (prefix, branches) in enumerate(zip(prefixes, completions, strict=True)):
            length = len(prefix) + max(map(len, branches), default=0)
            if length > self.max_positions:
                name = ids[number][0] if ids and ids[number] else f"row {number}"
                raise LayoutError(
                    f"{name}: {len(prefix)} tokens of image and prompt and {length - len(prefix)} "
                    f"of a completion, but {self.name or 'the model'} has "
                    f"{self.max_positions} positions. Lower train.max_length, or shorten the record"
                )

    @contextlib.contextmanager
    def adapter_off(self) -> Any:
        """The base model on the same weights, inside the context."""
        if hasattr(self.model, "get_base_model"):
            with adapter_in_place(self.model, None):
                yield
        else:
            yield


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
