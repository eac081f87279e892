"""The model, the pairs and the group of a benchmark: random weights, real token counts."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from mlalign.branching.attention import use
from mlalign.images import to_png
from mlalign.microworld.language import vocabulary
from mlalign.microworld.model import CHAT_TEMPLATE, new_tokenizer
from mlalign.models._vlm import VLM
from mlalign.models.loading import family_of
from mlalign.records import Example, Facts, ImageRef, Preference

WORDS = tuple(word for word in vocabulary() if word.isalpha())[:64]
"""One token each."""
GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""LLaVA-NeXT's tilings."""


@dataclass(frozen=True)
class Setting:
    """Geometry of model and pairs. The default is what two CPU cores can measure."""

    layers: int = 8
    width: int = 1024
    intermediate: int = 2816
    heads: int = 16
    vocabulary: int = 32_064
    tower_layers: int = 4
    tower_width: int = 256
    rank: int = 16
    image: str = "llava"
    """llava: one view of 576 tokens; llava_next: five tiles, about 2,880."""
    prefix: int = 600
    """Tokens of image and prompt."""
    completions: tuple[int, int] = (100, 100)
    """Least and most tokens of a completion; drawn uniformly where they differ."""
    pairs: int = 1
    """Pairs per step."""
    group: int = 8
    """Completions of a prompt where a step is one of a group."""
    dtype: str = "float32"
    checkpointing: bool = False
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """For the JSON."""
        return asdict(self)

    def at(self, **changes: Any) -> Setting:
        """The same with some fields changed."""
        return replace(self, **changes)


def new_vlm(setting: Setting) -> VLM:
    """A random LLaVA of the geometry; the same weights for the same setting."""
    tower = CLIPVisionConfig(
        hidden_size=setting.tower_width,
        intermediate_size=4 * setting.tower_width,
        num_hidden_layers=setting.tower_layers,
        num_attention_heads=max(1, setting.tower_width // 64),
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.width,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads,
        max_position_embeddings=8192,
        pad_token_id=0,
    )
    processor = _processor(setting)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    common: dict[str, Any] = {
        "vision_config": tower,
        "text_config": text,
        "image_token_id": token,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        if setting.image == "llava_next":
            config = LlavaNextConfig(**common, image_grid_pinpoints=GRIDS)
            model: Any = LlavaNextForConditionalGeneration(config)
        else:
            model = LlavaForConditionalGeneration(LlavaConfig(**common))
    model = model.to(getattr(torch, setting.dtype)).eval()
    model.config.architectures = [type(model).__name__]
    vlm = VLM(model=model, processor=processor, family=family_of(model.config), name="bench")
    use(vlm.core)
    return vlm


def _processor(setting: Setting) -> Any:
    tokenizer = new_tokenizer()
    tokenizer.model_max_length = 8192
    side = {"height": 336, "width": 336}
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }
    if setting.image == "llava_next":
        tiles = LlavaNextImageProcessorPil(
            size={"shortest_edge": 336}, crop_size=side, image_grid_pinpoints=GRIDS
        )
        return LlavaNextProcessor(image_processor=tiles, **common)
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side), **common
    )


def new_pairs(setting: Setting, vlm: VLM) -> list[Preference]:
    """Pairs of the setting's exact token counts, each with a picture of its own."""
    rng = random.Random(setting.seed)
    size = image_size(setting)
    made = []
    for number in range(setting.pairs):
        least, most = setting.completions
        lengths = [rng.randint(least, most) for _ in range(2)]
        image = ImageRef(data=to_png(picture(size, number)))
        made.append(
            Preference(
                id=f"pair-{number}",
                image=image,
                image_sha256=image.sha256(),
                prompt=_prompt(setting, vlm, size, rng),
                # The end-of-turn token is one of them.
                chosen=_text(rng, lengths[0] - 1),
                rejected=_text(rng, lengths[1] - 1),
                origin={"source": "bench"},
            )
        )
    return made


@dataclass(frozen=True, kw_only=True)
class Group:
    """A prompt with completions, as if sampled, and what each was worth."""

    example: Example
    completions: list[list[int]]
    """Token ids, the end of turn included."""
    rewards: list[float]


def new_group(setting: Setting, vlm: VLM) -> Group:
    """A group of the setting's exact token counts."""
    rng = random.Random(setting.seed)
    size = image_size(setting)
    least, most = setting.completions
    image = ImageRef(data=to_png(picture(size, 0)))
    texts = [_text(rng, rng.randint(least, most) - 1) for _ in range(setting.group)]
    return Group(
        example=Example(
            id="group-0",
            image=image,
            image_sha256=image.sha256(),
            prompt=_prompt(setting, vlm, size, rng),
            facts=Facts(),
            source="bench",
        ),
        completions=[
            [*vlm.tokenizer(text)["input_ids"], vlm.tokenizer.eos_token_id] for text in texts
        ],
        rewards=[rng.random() for _ in texts],
    )


def image_size(setting: Setting) -> tuple[int, int]:
    """Width and height of the setting's pictures."""
    return (672, 640) if setting.image == "llava_next" else (336, 336)


def questions(vlm: VLM, size: tuple[int, int], count: int, tokens: int) -> list[str]:
    """Prompts on one image whose templates differ in the last ``tokens`` tokens."""
    rng = random.Random(0)
    shared, _ = vlm.question_ids([WORDS[0], WORDS[1]], size)
    base = len(vlm.prefix_ids(WORDS[0], size)) - len(shared)
    return [_text(rng, tokens - base + 1) for _ in range(count)]


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture of noise in blocks."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (12, 12, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize(size)


def _prompt(setting: Setting, vlm: VLM, size: tuple[int, int], rng: random.Random) -> str:
    bare = len(vlm.prefix_ids(WORDS[0], size)) - 1
    if setting.prefix <= bare:
        raise ValueError(f"bench: a prefix needs more than {bare} tokens: the image takes them")
    return _text(rng, setting.prefix - bare)


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))
