"""Small Qwen-VL folders: byte-level tokenizer with the family's tokens, a template like its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mlalign.models._vlm import VLM
from tests.models import exact

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

_TURNS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
)

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [2, 3, 3],
    },
}
"""Settings of a small decoder that the families share."""

VISION: dict[str, Any] = {"depth": 3, "num_heads": 2, "initializer_range": 0.1}
"""Settings of a small tower that the families share."""


def new_tokenizer(*, system: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, so that any text can be told. ``system``: whether the
    template adds a system turn of its own, as Qwen2-VL's does and Qwen3-VL's does not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [*exact.PROMPTS, *(text for answers in exact.ANSWERS for text in answers)]
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL[1:]),
        chat_template=(_SYSTEM if system else "") + _TURNS,
        padding_side="left",
    )


def marks(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Ids of the special tokens, by the names that the families' configs give them."""
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(word) for key, word in names.items()}


def save(folder: Path, model_class: Any, config: Any, patch: int, system: bool) -> Path:
    """A seeded model, its tokenizer and image processor (``patch``: pixels), in ``folder``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    tokenizer = new_tokenizer(system=system)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = 2 * patch
    size = {"shortest_edge": 4 * side**2, "longest_edge": 24 * side**2}
    Qwen2VLImageProcessorPil(size=size, patch_size=patch).save_pretrained(folder)
    return folder


def qwen2_vl(folder: Path, **text: Any) -> Path:
    """``text``: further settings of the decoder."""
    tokenizer = new_tokenizer(system=True)
    vision = {"embed_dim": 32, "hidden_size": 64}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer), **text},
        vision_config={**VISION, **vision},
        **marks(tokenizer),
    )
    return save(folder, transformers.Qwen2VLForConditionalGeneration, config, 14, system=True)


def qwen2_5_vl(folder: Path) -> Path:
    """Windows of 2 x 2 tokens in the tower, but for its last block."""
    tokenizer = new_tokenizer(system=True)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [2],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        vision_config={**VISION, **vision},
        **marks(tokenizer),
    )
    return save(folder, transformers.Qwen2_5_VLForConditionalGeneration, config, 14, system=True)


def qwen3_vl(folder: Path) -> Path:
    """Two deepstack levels, a learned position grid of 8 x 8."""
    tokenizer = new_tokenizer(system=False)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "vocab_size": len(tokenizer)},
        vision_config={**VISION, **vision},
        **marks(tokenizer),
    )
    return save(folder, transformers.Qwen3VLForConditionalGeneration, config, 16, system=False)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}
"""What writes a small model folder, by the name of the family's file."""

PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}
"""The families' own processors, by ``model_type``."""


def stock_processor(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The family's own processor. Its video part needs torchvision; images do not need that part,
    so only the check that it is there is left out."""
    made = getattr(transformers, PROCESSORS[vlm.core.config.model_type])
    monkeypatch.setattr(made, "check_argument_for_proper_class", lambda *_: None)
    parts = vlm.processor
    return made(parts.image_processor, parts.tokenizer, chat_template=parts.chat_template)


def prompt_text(stock: Any, prompt: str) -> str:
    """The chat template over one image and a prompt, the placeholder not yet expanded."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    return stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
