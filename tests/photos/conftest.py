"""A composed LLaVA with a random, tiny language model: no package of weights is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def random_tower():
    """The tower with random weights that keep the signal's size from layer to layer."""
    from mlalign.models._effnet_tower import EffnetLite0Config, EffnetLite0Model

    torch.manual_seed(0)
    tower = EffnetLite0Model(EffnetLite0Config())
    for module in tower.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return tower


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level tokenizer with SmolLM2's special tokens and the image token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters]
    raw = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.fixture(scope="session")
def composed(tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the composed model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mlalign.photos.compose import assemble, new_processor

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer) - 1,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    model = assemble(
        LlamaForCausalLM(config), random_tower(), len(tiny_tokenizer), tiny_tokenizer.pad_token_id
    )
    folder = tmp_path_factory.mktemp("composed")
    model.save_pretrained(str(folder))
    new_processor(tiny_tokenizer).save_pretrained(str(folder))
    return folder


@pytest.fixture
def vlm(composed: Path):
    """The composed model, loaded as any other. Anew for each test: some train it."""
    from mlalign.models.loading import load_vlm_from

    return load_vlm_from(composed, dtype="float32")
