"""Text to tokens and back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from disttrain.data.vocabulary import Bytes, Characters, TokenizerFile, vocabulary_of
from disttrain.errors import ConfigurationError

TEXT = "Straße, 東京 🚀\n\x00e\u0301"


def test_characters_are_numbered_in_the_order_of_unicode_and_come_back() -> None:
    vocabulary = Characters.of_texts([TEXT, "b"])
    tokens, num_bytes = vocabulary.encode(TEXT)
    assert vocabulary.decode([*tokens.tolist(), vocabulary.end_of_text]) == TEXT
    assert num_bytes is not None
    assert num_bytes.tolist() == [len(character.encode()) for character in TEXT]
    assert vocabulary.size == len(set(TEXT) | {"b"}) + 1
    assert vocabulary.encode("\x00")[0].tolist() == [0]
    # A checkpoint's state is JSON: what is in it is enough.
    again = vocabulary_of(json.loads(json.dumps(vocabulary.facts())))
    assert again is not None
    assert again.encode(TEXT)[0].tolist() == tokens.tolist()


@pytest.mark.parametrize("characters", [None, "ba", "aa", ["a"], "\ud800"])
def test_a_damaged_alphabet_is_refused(characters: object) -> None:
    with pytest.raises(ConfigurationError, match="not an alphabet in order"):
        vocabulary_of({"tokens": "characters", "characters": characters})


def test_an_unknown_character_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"character 'z' \(U\+007A\)"):
        Characters.of_texts(["abc"]).encode("az")
    with pytest.raises(ConfigurationError, match="character 'a'"):
        Characters("").encode("a")


def test_bytes_take_whatever_comes() -> None:
    vocabulary = Bytes()
    tokens, num_bytes = vocabulary.encode(TEXT)
    assert num_bytes is None
    assert vocabulary.decode([*tokens.tolist(), 256]) == TEXT
    assert vocabulary.decode([0xFF, 0x41]) == "\ufffdA"
    assert isinstance(vocabulary_of(vocabulary.facts()), Bytes)
    assert vocabulary_of({"vocab_size": 7}) is None


def byte_level_tokenizer(path: Path, special: tuple[str, ...] = ()) -> Path:
    """A tokenizer.json of byte pairs, trained on a few words."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the cat and the hat and the bat " * 20], trainer)
    tokenizer.enable_truncation(5)  # as such files often have it; a text is not cut for it
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_file(tmp_path: Path) -> None:
    path = byte_level_tokenizer(tmp_path / "tokenizer.json")
    vocabulary = TokenizerFile(str(path))
    tokens, num_bytes = vocabulary.encode(TEXT + "the cat and the hat")
    assert vocabulary.decode(tokens.tolist()) == TEXT + "the cat and the hat"
    assert num_bytes is not None
    assert num_bytes.sum() == len((TEXT + "the cat and the hat").encode())
    assert len(tokens) < len(TEXT.encode()) + 19, "there are pairs"
    assert tokens.max() < vocabulary.size
    assert vocabulary.end_of_text == vocabulary.size - 1, "the file has none of its own"
    assert isinstance(vocabulary_of(vocabulary.facts()), TokenizerFile)
    assert len(vocabulary.encode("")[0]) == 0

    own = TokenizerFile(str(byte_level_tokenizer(tmp_path / "own.json", ("<unk>", "<|endoftext|>"))))
    assert own.end_of_text == 1
    assert own.decode([1, *own.encode("the cat")[0].tolist(), 1]) == "the cat"

    path.write_text(path.read_text() + " ")
    with pytest.raises(ConfigurationError, match="is not the tokenizer of the run: its SHA-256 begins"):
        vocabulary_of(vocabulary.facts())
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="is not a file of the tokenizers package"):
        TokenizerFile(str(path))
    with pytest.raises(ConfigurationError, match=r"none.json cannot be read: No such file"):
        TokenizerFile(str(tmp_path / "none.json"))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigurationError, match="pip install tokenizers"):
        TokenizerFile("tokenizer.json")


def test_many_characters_take_wider_numbers() -> None:
    text = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 300))
    tokens, num_bytes = Characters.of_texts([text]).encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == list(range(300))
    assert num_bytes is not None
    assert set(num_bytes.tolist()) == {3}
