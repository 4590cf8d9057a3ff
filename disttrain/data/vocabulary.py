"""What turns text into tokens and back: characters, bytes, or a file of Hugging Face's `tokenizers`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, TypeGuard

import numpy as np

from disttrain.errors import ConfigurationError, brief
from disttrain.files import open_to_read
from disttrain.recipe.address import expanded

# What tokenizers' files call the token between two documents; of those that a file has, the first is used.
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Vocabulary(Protocol):
    """Text as numbers below `size`; `end_of_text` is the one that stands before, between and after documents."""

    size: int
    end_of_text: int

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        """The tokens of a text, (n,) unsigned, and how many bytes of UTF-8 each is for, (n,); None: one each.

        Raises ConfigurationError for a text that it has no tokens for.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without any `end_of_text`."""
        ...

    def facts(self) -> dict[str, Any]:
        """All that `vocabulary_of` needs, as JSON can hold it: a checkpoint notes it."""
        ...


class Bytes:
    """A token is a byte."""

    size = 257
    end_of_text = 256

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Vocabulary.encode`."""
        return np.frombuffer(text.encode(), dtype=np.uint8), None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are not UTF-8 as U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")

    def facts(self) -> dict[str, Any]:
        """See `Vocabulary.facts`."""
        return {"tokens": "bytes", "vocab_size": self.size, "end_of_text": self.end_of_text}


class Characters:
    """A token is a character (a Unicode code point), numbered in the order of Unicode."""

    def __init__(self, characters: str) -> None:
        """`characters` is the alphabet, in order and each once, as `of_texts` makes it."""
        self._characters = characters
        self._codes = _code_points(characters)
        # How many bytes of UTF-8 a code point takes.
        self._num_bytes = (1 + (self._codes >= 0x80) + (self._codes >= 0x800) + (self._codes >= 0x10000)).astype("u1")
        self._dtype = np.min_scalar_type(len(characters))
        self.size, self.end_of_text = len(characters) + 1, len(characters)

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> Characters:
        """Those that occur in the texts."""
        return cls("".join(sorted(set().union(*(set(text) for text in texts)))))

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Vocabulary.encode`."""
        codes = _code_points(text)
        tokens = np.searchsorted(self._codes, codes).clip(max=max(0, len(self._codes) - 1))
        unknown = codes[self._codes[tokens] != codes] if len(self._codes) else codes
        if len(unknown):
            raise ConfigurationError(
                f"the text has the character {chr(unknown[0])!r} (U+{unknown[0]:04X}), which the run's texts do not "
                "have; leave it out, or train with data.options.tokens = 'bytes'."
            )
        return tokens.astype(self._dtype), self._num_bytes[tokens]

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Vocabulary.decode`."""
        return "".join(self._characters[token] for token in tokens if token < self.end_of_text)

    def facts(self) -> dict[str, Any]:
        """See `Vocabulary.facts`."""
        return {
            "tokens": "characters",
            "vocab_size": self.size,
            "end_of_text": self.end_of_text,
            "characters": self._characters,
        }


class TokenizerFile:
    """The tokens of a file that Hugging Face's `tokenizers` wrote (tokenizer.json).

    Such a file may have megabytes, so a checkpoint notes where it is and its SHA-256.
    """

    def __init__(self, path: str, sha256: str | None = None) -> None:
        """Raises ConfigurationError without the package, and for a file that cannot be read or is another one."""
        key = "data.options.tokens"
        try:
            tokenizers: Any = import_module("tokenizers")
        except ImportError as error:
            raise ConfigurationError(f"{key}: {path} needs a package; pip install tokenizers.") from error
        self._path = str(expanded(path).absolute())
        try:
            with open_to_read(self._path, follow=True) as file:
                content = file.read()
        except OSError as error:
            raise ConfigurationError(
                f"{key}: the tokenizer file {self._path} cannot be read: {error.strerror}; give 'characters', 'bytes' "
                "or the path of a tokenizer.json."
            ) from error
        self._sha256 = hashlib.sha256(content).hexdigest()
        if sha256 not in (None, self._sha256):
            raise ConfigurationError(
                f"{key}: {self._path} is not the tokenizer of the run: its SHA-256 begins {self._sha256[:12]}, and the "
                f"run's {str(sha256)[:12]}; put that one there."
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises plain Exceptions
            raise ConfigurationError(
                f"{key}: {self._path} is not a file of the tokenizers package: {brief(error)}."
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = [self._tokenizer.token_to_id(name) for name in _ENDS_OF_TEXT]
        num_tokens = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.end_of_text: int = next((token for token in known if token is not None), num_tokens)
        self.size: int = max(num_tokens, self.end_of_text + 1)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Vocabulary.encode`."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        codes = _code_points(text)
        lengths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        bytes_before = np.concatenate([[0], np.cumsum(lengths)])
        # Up to its end, so that white space which a tokenizer drops counts with the token after it.
        ends = np.maximum.accumulate([end for _, end in encoded.offsets] or [0])[: len(encoded.ids)]
        num_bytes = np.diff(bytes_before[ends], prepend=0).clip(max=2**16 - 1)
        return np.array(encoded.ids, dtype=np.min_scalar_type(self.size)), num_bytes.astype(np.uint16)

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Vocabulary.decode`."""
        return str(self._tokenizer.decode([token for token in tokens if token != self.end_of_text]))

    def facts(self) -> dict[str, Any]:
        """See `Vocabulary.facts`."""
        return {
            "tokens": "tokenizer",
            "vocab_size": self.size,
            "end_of_text": self.end_of_text,
            "tokenizer": self._path,
            "tokenizer_sha256": self._sha256,
        }


def vocabulary_of(facts: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary that a data set's facts describe, also from a checkpoint; None if they describe none.

    Raises ConfigurationError for a tokenizer file that is not there or no longer the same, and for damaged facts.
    """
    kind = facts.get("tokens")
    if kind == "bytes":
        return Bytes()
    if kind == "characters":
        characters = facts.get("characters")
        if not _is_alphabet(characters):
            raise ConfigurationError("the facts of the texts are damaged: 'characters' is not an alphabet in order.")
        return Characters(characters)
    if kind == "tokenizer":
        return TokenizerFile(str(facts.get("tokenizer")), str(facts.get("tokenizer_sha256")))
    return None


def _is_alphabet(characters: Any) -> TypeGuard[str]:
    if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
        return False
    return not any("\ud800" <= character <= "\udfff" for character in characters)  # halves of one, in JSON alone


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
