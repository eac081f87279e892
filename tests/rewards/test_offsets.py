"""Which characters each sampled token spells: byte pieces, blanks, words, the end of turn."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlalign.microworld.model import new_processor
from mlalign.records import RecordError
from mlalign.rewards._offsets import completion_of, token_offsets
from tests.rewards.answers import example

TEXTS = (
    "In this kitchen, top left is a red pot.",
    "a dog  and\na cat",
    "naïve café, 東京 🐕‍🦺!",
    "x",
)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges: characters of several bytes are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXTS[0], "a dog and a cat"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.mark.parametrize("text", TEXTS)
def test_agrees_with_the_tokenizers_own_offsets_but_for_blanks(bpe, text: str):
    encoded = bpe(text, return_offsets_mapping=True, add_special_tokens=False)
    ours = token_offsets(bpe, encoded["input_ids"], text, "r")
    assert len(ours) == len(encoded["input_ids"])
    for (start, end), (a, b) in zip(ours, encoded["offset_mapping"], strict=True):
        theirs = text[a:b]
        # The tokenizer counts the blank before a word to it.
        assert text[start:end].split() == theirs.split()
        if theirs.strip():
            assert a + len(theirs) - len(theirs.lstrip()) == start


def test_every_character_is_spelt_and_in_order(bpe):
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choice("ab é東🐕.,\n ") for _ in range(rng.randint(1, 40))).strip()
        ids = bpe(text, add_special_tokens=False)["input_ids"]
        offsets = token_offsets(bpe, ids, text, "r")
        spelt = {i for start, end in offsets for i in range(start, end) if not text[i].isspace()}
        assert spelt == {i for i, c in enumerate(text) if not c.isspace()}
        assert list(offsets) == sorted(offsets)


def test_a_character_of_several_bytes_is_spelt_by_each(bpe):
    ids = bpe("a東b", add_special_tokens=False)["input_ids"]
    assert token_offsets(bpe, ids, "a東b", "r") == ((0, 1), (1, 2), (1, 2), (1, 2), (2, 3))


def test_another_spelling_than_the_tokenizers_own(bpe):
    letters = [bpe.convert_tokens_to_ids(c) for c in "kitchen"]
    assert len(bpe("kitchen", add_special_tokens=False)["input_ids"]) < len(letters)
    assert token_offsets(bpe, letters, "kitchen", "r") == tuple((i, i + 1) for i in range(7))


def test_words_and_marks_of_the_built_in_world():
    tokenizer = new_processor().tokenizer
    text = "In this kitchen, top left is a red pot."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    offsets = token_offsets(tokenizer, ids, text, "r")
    assert [text[a:b] for a, b in offsets] == text.replace(",", " ,").replace(".", " .").split()


def test_text_that_the_tokens_do_not_spell_is_refused(bpe):
    ids = bpe("a dog", add_special_tokens=False)["input_ids"]
    with pytest.raises(RecordError, match=r"record 'r', text: .* so its words have no tokens"):
        token_offsets(bpe, ids, "a dog!", "r")


def test_completion_ends_with_its_turn(bpe):
    end = bpe.eos_token_id
    ids = bpe(" a dog", add_special_tokens=False)["input_ids"]
    whole = completion_of(bpe, [end], example(), [*ids, end, end], sample=2)
    assert (whole.text, whole.stopped, whole.sample) == ("a dog", True, 2)
    assert whole.token_ids == (*ids, end)
    assert whole.offsets[-1] == (5, 5)
    cut = completion_of(bpe, [end], example(), ids)
    assert (cut.stopped, cut.offsets) == (False, whole.offsets[:-1])
    silent = completion_of(bpe, [end], example(), [end])
    assert (silent.text, silent.offsets, silent.stopped) == ("", ((0, 0),), True)
