"""What a model family is: one file that says what is particular to it, on top of a common base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass(frozen=True)
class ImageInputs:
    """One image as the vision tower takes it."""

    tensors: dict[str, Tensor]
    """The tower's inputs for this image, as the image processor gives them."""
    size: tuple[int, int]
    """(width, height) of the image itself, in pixels."""


class Family:
    """Base of the families: LLaVA's layout. Subclasses change what differs. Stateless."""

    architectures: tuple[str, ...] = ()
    """Class names, in a model's config, that this family serves."""
    language_model = "language_model"
    """Attribute of the inner model that holds the decoder blocks."""
    towers: tuple[str, ...] = ("vision_tower", "multi_modal_projector")
    """Attributes of the inner model that see the image only: tower first, projector last."""
    bare: tuple[str, ...] = ()
    """Parameters of the inner model itself that ``features`` reads (ZeRO-3 must gather them)."""

    @classmethod
    def lora_targets(cls, core: nn.Module) -> str:
        """Regular expression for the linears of the language model's blocks, and of nothing else.

        ``all-linear`` or ``["q_proj", "v_proj"]`` would also adapt the vision tower.
        """
        return rf".*\.{cls.language_model}\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"

    @classmethod
    def layers(cls, core: Any) -> nn.ModuleList:
        """The decoder blocks of the language model, first to last."""
        return getattr(core.model, cls.language_model).layers

    @classmethod
    def frozen_towers(cls, core: Any) -> list[nn.Module]:
        """Modules that see the image only."""
        return [getattr(core.model, name) for name in cls.towers]

    @classmethod
    def projectors(cls, core: Any) -> list[str]:
        """Names, in the model, of the modules between tower and language model."""
        last = cls.frozen_towers(core)[-1]
        members = list(last) if isinstance(last, nn.ModuleList) else [last]
        return [name for name, each in core.named_modules() if any(each is m for m in members)]

    @classmethod
    def image_token_id(cls, core: Any) -> int:
        """Id of the placeholder that stands once for every image token."""
        return int(core.config.image_token_id)

    # The image, in.

    @classmethod
    def prepare(cls, image: Image.Image, processor: Any, mode: str) -> Image.Image:
        """The image as the image processor gets it. ``mode``: recipe.ModelSection.image.

        Raises ValueError for a mode that the family does not have.
        """
        if mode != "crop":
            raise ValueError(
                f"model.image: {mode} is LLaVA-1.5's; {cls.__name__} sees images by its own "
                "processor. Set model.image: crop (the stock processor)"
            )
        return image

    @classmethod
    def inputs(cls, processor: Any, image: Image.Image, mode: str) -> ImageInputs:
        """What the vision tower takes of one image."""
        seen = cls.prepare(image, processor, mode)
        made = processor.image_processor(images=seen, return_tensors="pt")
        return ImageInputs({key: made[key] for key in cls.keys(made)}, image.size)

    @classmethod
    def keys(cls, made: Any) -> list[str]:
        """Which outputs of the image processor ``features`` takes."""
        return ["pixel_values"]

    @classmethod
    def blank(cls, inputs: ImageInputs) -> ImageInputs:
        """The same layout with every pixel at the processor's mean colour: zeros."""
        tensors = dict(inputs.tensors)
        tensors["pixel_values"] = torch.zeros_like(tensors["pixel_values"])
        return ImageInputs(tensors, inputs.size)

    @classmethod
    def collate(cls, images: Sequence[ImageInputs]) -> dict[str, Tensor]:
        """Inputs of several images for one call of ``features``."""
        return {
            key: torch.cat([image.tensors[key] for image in images]) for key in images[0].tensors
        }

    @classmethod
    def features(cls, core: Any, images: dict[str, Tensor]) -> Any:
        """The model's own ``get_image_features`` of collated images."""
        return core.model.get_image_features(**images, return_dict=True)

    @classmethod
    def arrange(cls, found: Any, order: Sequence[int]) -> Any:
        """``features`` output for the images in ``order``, which may repeat or leave out some."""
        pooled = found.pooler_output
        return BaseModelOutputWithPooling(pooler_output=[pooled[i] for i in order])  # type: ignore[arg-type]

    # The text, in.

    @classmethod
    def image_text(cls, processor: Any, size: tuple[int, int]) -> str:
        """What the template's image placeholder becomes for an image of ``size`` (w, h)."""
        raise NotImplementedError

    @classmethod
    def placeholder(cls, processor: Any) -> str:
        """What the chat template writes where the image goes."""
        return processor.image_token

    @classmethod
    def template_ids(
        cls,
        processor: Any,
        messages: list[dict[str, Any]],
        generation: bool,
        size: tuple[int, int],
    ) -> list[int]:
        """Token ids of the chat template over ``messages``, image tokens expanded.

        The same as the stock ``apply_chat_template(..., tokenize=True)``.
        """
        text = cls.template_text(processor, messages, generation, size)
        tokenizer = processor.tokenizer
        return list(tokenizer(text, add_special_tokens=adds_bos(tokenizer, text))["input_ids"])

    @classmethod
    def template_text(
        cls,
        processor: Any,
        messages: list[dict[str, Any]],
        generation: bool,
        size: tuple[int, int],
    ) -> str:
        """The chat template over ``messages``, image tokens expanded, before the tokenizer."""
        text = processor.apply_chat_template(
            messages, add_generation_prompt=generation, tokenize=False
        )
        return text.replace(cls.placeholder(processor), cls.image_text(processor, size), 1)

    @classmethod
    def generation(
        cls, ids_RT: Tensor, image_token_id: int, images: Sequence[ImageInputs]
    ) -> dict[str, Tensor]:
        """Further keywords of ``generate`` for left-padded rows with one image each."""
        return {}

    # The layout.

    @classmethod
    def positions(cls, core: Any, prefix: Sequence[int], image: ImageInputs) -> Tensor | None:
        """int64 (A, tokens) positions of a prefix; None: 0, 1, 2... in one row."""
        return None

    @classmethod
    def image_blocks(cls, core: Any) -> bool:
        """Whether the tokens of an image attend to each other both ways."""
        return False

    # Where image tokens look.

    @classmethod
    def grid(cls, processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the image tokens. Raises NotImplementedError where there is no grid
        that a box could be laid on."""
        raise NotImplementedError(
            f"{cls.__name__}: boxes are not mapped to its image tokens yet; leave box probes out"
        )

    @classmethod
    def patch_mask(
        cls,
        processor: Any,
        box: tuple[float, float, float, float],
        size: tuple[int, int],
        mode: str,
    ) -> Tensor:
        """Bool (P,): the image tokens that ``box`` touches (pixels of an image of ``size``)."""
        raise NotImplementedError(
            f"{cls.__name__}: boxes are not mapped to its image tokens yet; leave box probes out"
        )


def adds_bos(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer's own special tokens belong around a template's text.

    As in the stock processors: unless the template wrote the BOS itself (that of LLaVA-1.5 and
    LLaVA-NeXT does not).
    """
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
