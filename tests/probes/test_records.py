"""The probe set at rest, and where its words stand among the tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from mlalign.microworld.model import new_tokenizer
from mlalign.objects import vocabulary
from mlalign.probes import _records
from mlalign.probes._records import mentions, tokens_of_span
from mlalign.records import RecordError
from tests.probes import tiny

TEXT = "A café table stands in the kitchen, beside a dog. The naïve dog — red — sleeps."


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """Byte-level pieces of at most a few letters, so that words and even letters are split."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 20, vocab_size=280, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="</s>")


@pytest.mark.parametrize("word", ["café", "table", "kitchen", "dog", "naïve", "—", "sleeps"])
def test_byte_pieces_spell_their_word(bpe: PreTrainedTokenizerFast, word: str) -> None:
    ids = [*bpe(TEXT)["input_ids"], bpe.eos_token_id]
    start = TEXT.index(word)
    tokens = tokens_of_span(bpe, ids, TEXT, start, start + len(word), "r")
    assert bpe.decode([ids[t] for t in tokens]).strip() == word
    if word in ("café", "naïve", "sleeps"):
        assert len(tokens) > 1, "the word must be split for this test to say anything"


def test_every_word_of_a_word_level_text() -> None:
    tokenizer = new_tokenizer()
    record = tiny.records(1)[0]
    ids = [*tokenizer(record.chosen, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    for span in vocabulary("microworld").objects(record.chosen):
        (token,) = tokens_of_span(tokenizer, ids, record.chosen, span.start, span.end, "r")
        assert tokenizer.decode([ids[token]]).strip() == record.chosen[span.start : span.end]


def test_mentions_are_marked_by_the_facts() -> None:
    tokenizer = new_tokenizer()
    record = tiny.records(1)[0]
    ids = tokenizer(record.rejected, add_special_tokens=False)["input_ids"]
    found = mentions(
        record.rejected, record.facts, vocabulary("microworld"), tokenizer, ids, record.id
    )
    assert [m.real for m in found].count(False) == 1
    assert all(m.real == (m.name in record.facts.names()) for m in found)


def test_text_that_the_tokenizer_cannot_spell_is_refused() -> None:
    tokenizer = new_tokenizer()
    ids = tokenizer("a zebra", add_special_tokens=False)["input_ids"]
    with pytest.raises(RecordError, match="record 'r', text: 'a zebra' decodes as"):
        tokens_of_span(tokenizer, ids, "a zebra", 2, 7, "r")


def test_saved_and_loaded(tmp_path: Path) -> None:
    made = tiny.records(3)
    digest = _records.save(tmp_path / "set", made)
    loaded = _records.load(tmp_path / "set")
    assert digest == _records.fingerprint(tmp_path / "set")
    for before, after in zip(made, loaded, strict=True):
        assert after.image.read() == before.image.read()
        assert (after.id, after.prompt, after.texts) == (before.id, before.prompt, before.texts)
        assert after.facts == before.facts
    assert _records.save(tmp_path / "again", loaded) == digest
    assert _records.save(tmp_path / "other", made[:2]) != digest


def test_a_failed_write_leaves_the_old_set(tmp_path: Path) -> None:
    digest = _records.save(tmp_path / "set", tiny.records(2))

    def broken():
        yield tiny.records(1)[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _records.save(tmp_path / "set", broken())
    assert _records.fingerprint(tmp_path / "set") == digest
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_changed_image_is_found(tmp_path: Path) -> None:
    _records.save(tmp_path / "set", tiny.records(1))
    image = next((tmp_path / "set" / "images").iterdir())
    image.write_bytes(image.read_bytes() + b"x")
    with pytest.raises(RecordError, match="changed"):
        _records.load(tmp_path / "set")


def test_empty_sets_and_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one record"):
        _records.save(tmp_path / "set", [])
    assert not (tmp_path / "set").exists()
    record = tiny.records(1)[0]
    with pytest.raises(RecordError, match="own: empty"):
        _records.ProbeRecord(**{**record.__dict__, "own": " "})
