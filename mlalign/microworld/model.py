"""The microworld's LLaVA: a stock model, tokenizer and processor, and where the trained one lies.

Everything is an ordinary ``transformers`` object, so ``AutoProcessor.from_pretrained`` and
``LlavaForConditionalGeneration.from_pretrained`` on ``base_folder()`` is all that a user needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mlalign.microworld.language import vocabulary
from mlalign.microworld.scenes import IMAGE_SIZE

PATCH_SIZE = 16
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
MAX_TOKENS = 512
"""Positions that the language model knows."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|user|>", "<|assistant|>", "<|system|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def base_folder() -> Path:
    """The shipped folder: model, processor and tokenizer as ``save_pretrained`` wrote them."""
    return Path(__file__).parent / "base"


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or mark; decoding gives the text back without odd blanks.

    A word is stored with the mark of the blank before it, as SentencePiece does, so "kitchen,"
    needs no clean-up rule. Unknown words become <unk>.
    """
    words = [word if not word[0].isalpha() else "▁" + word for word in vocabulary()]
    ids = {token: i for i, token in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Replace(Regex(r" $"), "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
            pre_tokenizers.Split(Regex(r"""[.,?;:!'"\-]"""), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "user_token": "<|user|>",
            "assistant_token": "<|assistant|>",
            "system_token": "<|system|>",
        },
        model_max_length=MAX_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_processor() -> LlavaProcessor:
    """The processor of an untrained or trained microworld model."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=new_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """An untrained model of about 2.4 million weights, the same for the same seed."""
    tokenizer = new_tokenizer()
    marks: dict[str, Any] = {
        key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_TOKENS,
        # slow rotations: words and image tokens are matched by content over 200 positions
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        initializer_range=0.04,
        tie_word_embeddings=True,
        **marks,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        **{"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), **marks},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.update(max_new_tokens=96, **marks)
    return model
