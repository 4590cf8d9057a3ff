"""Text, from files or from Python's own documentation: tokens in blocks, with some of it held out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from disttrain import rng
from disttrain.data.dataset import SampleSet, SampleSets
from disttrain.data.sources.text_files import find_texts, map_bytes, read_utf8
from disttrain.data.token_sets import Document, PackedTokens, PaddedDocuments, TokenSet
from disttrain.data.vocabulary import Bytes, Characters, TokenizerFile, Vocabulary, vocabulary_of
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe
from disttrain.recipe.address import expanded

_log = logging.getLogger(__name__)
_SPLIT_SEED = 0
_FEW = 10  # of fewer documents, each gives its end to the test part
_LAYOUTS: dict[str, type[TokenSet]] = {"packed": PackedTokens, "padded": PaddedDocuments}


@dataclass(frozen=True)
class TextOptions:
    """What `data.options` may hold."""

    files: str | list[str] | None = None
    """Which files below `data.root`: patterns over their paths from there, where `*` also matches slashes."""
    test_files: str | list[str] | None = None
    """Which of them are the test part; None: `test_fraction` of the text."""
    test_fraction: float = 0.1
    tokens: str = "characters"
    """"characters", "bytes", or the path of a `tokenizers` JSON file."""
    context_length: int = 128
    layout: str = "packed"
    """"packed": documents one after another in blocks of one length; "padded": a document is a sample."""

    _WANTED: ClassVar = {
        "files": "a pattern such as '*.txt', or a list of them",
        "test_files": "a pattern such as 'test/*', or a list of them",
        "test_fraction": "a number between 0 and 1",
        "tokens": "'characters', 'bytes' or the path of a tokenizer.json",
        "context_length": "a whole number of 1 or more",
        "layout": "'packed' or 'padded'",
    }

    @classmethod
    def of(cls, options: dict[str, Any]) -> TextOptions:
        """Raises ConfigurationError for an option that there is not, or that has no such value."""
        for name, value in options.items():
            if name not in cls._WANTED:
                near = get_close_matches(name, cls._WANTED, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(cls._WANTED)}."
                raise ConfigurationError(f"data.options.{name}: no such option of 'text'; {hint}")
            if not _fits(name, value):
                raise ConfigurationError(f"data.options.{name}: {value!r} is not {cls._WANTED[name]}.")
        return cls(**options)


def load_text(data: DataRecipe, trained_on: Mapping[str, Any] | None = None) -> SampleSets:
    """The texts at `data.root`, a file or a folder, as `data.options` say; see `TextOptions`.

    With neither files nor a root, they are Python's own documentation topics: English that is always there. Nothing
    depends on the order in which a file system lists its files. `trained_on` are the facts of the set that a model was
    trained on, if there is one: its tokens mean what they meant there. Raises ConfigurationError for an option, a file
    or a tokenizer that does not fit, and for texts that are too short to be divided.
    """
    options = TextOptions.of(data.options)
    vocabulary = None if trained_on is None else vocabulary_of(trained_on)
    if vocabulary is None and options.tokens == "bytes":
        vocabulary = Bytes()
    elif vocabulary is None and options.tokens != "characters":
        vocabulary = TokenizerFile(options.tokens)  # an alphabet is known when all texts are
    if options.files is None and data.root == DataRecipe().root:
        if options.test_files is not None:
            raise ConfigurationError("data.options.test_files: give data.root, the folder that holds your files, too.")
        train, test = _hold_out(_python_topics(), options.test_fraction)
    else:
        train, test = _from_files(data.root, options, as_bytes=isinstance(vocabulary, Bytes))
    if vocabulary is None:
        vocabulary = _alphabet(train, test)
    facts = vocabulary.facts() | {"context_length": options.context_length}
    layout = _LAYOUTS[options.layout]
    splits = [
        layout([_encoded(document, vocabulary) for document in part], vocabulary.end_of_text, options.context_length)
        for part in (train, test)
    ]
    return SampleSets(*(SampleSet(split, "the texts", facts, in_memory=True) for split in splits))


def _fits(name: str, value: Any) -> bool:
    if name in ("files", "test_files"):
        patterns = [value] if isinstance(value, str) else value
        return isinstance(patterns, list) and bool(patterns) and all(isinstance(one, str) and one for one in patterns)
    if name == "test_fraction":
        return type(value) in (int, float) and 0 < value < 1
    if name == "context_length":
        return type(value) is int and value >= 1
    return isinstance(value, str) and bool(value) and (name != "layout" or value in _LAYOUTS)


_Documents: TypeAlias = Sequence[Any]  # of str, or of (n,) uint8 arrays


def _from_files(root: str, options: TextOptions, *, as_bytes: bool) -> tuple[_Documents, _Documents]:
    found = find_texts(expanded(root), options.files, options.test_files)

    def documents(paths: Sequence[Path], part: str) -> _Documents:
        otherwise = ", leave it out by data.options.files, or set data.options.tokens = 'bytes'"
        of_paths: list[Any] = [
            map_bytes(path) if as_bytes else read_utf8(path, "data.root", otherwise) for path in paths
        ]
        with_text = [document for document in of_paths if len(document)]
        if len(with_text) < len(of_paths):
            _log.info("%d files are empty and skipped", len(of_paths) - len(with_text))
        if not with_text:
            raise ConfigurationError(f"data.root: all {len(paths)} {part}files in {root} are empty.")
        return with_text

    if options.test_files is None:
        return _hold_out(documents(found.train, ""), options.test_fraction)
    return documents(found.train, "training "), documents(found.test, "test ")


def _hold_out(documents: _Documents, fraction: float) -> tuple[_Documents, _Documents]:
    """Training and test documents: whole ones if there are enough, else the end of each is for the test.

    Which, depends on their number and lengths alone.
    """
    if len(documents) < _FEW:
        cuts = [len(document) - round(len(document) * fraction) for document in documents]
        train = [document[:cut] for document, cut in zip(documents, cuts, strict=True) if cut]
        test = [document[cut:] for document, cut in zip(documents, cuts, strict=True) if cut < len(document)]
    else:
        room = fraction * sum(map(len, documents))
        held_out = set()
        for number in rng.permutation(_SPLIT_SEED, 0, len(documents)).tolist():
            if len(documents[number]) <= room:
                held_out.add(number)
                room -= len(documents[number])
        train = [document for number, document in enumerate(documents) if number not in held_out]
        test = [documents[number] for number in sorted(held_out)]
    if not train or not test:
        raise ConfigurationError(
            f"data.options.test_fraction: {fraction} of {sum(map(len, documents)):,} characters in {len(documents)} "
            "documents leaves one of the parts empty; give another fraction, or more text."
        )
    return train, test


def _alphabet(train: _Documents, test: _Documents) -> Characters:
    """The characters of both parts, so that each text can be written and read back."""
    known, alphabet = (Characters.of_texts(part) for part in (train, [*train, *test]))
    if known.size < alphabet.size:
        only = sorted(set(alphabet.facts()["characters"]) - set(known.facts()["characters"]))
        _log.info(
            "characters that occur only in the test part, so no model can have learned them: %s%s",
            ", ".join(map(repr, only[:5])),
            ", …" if len(only) > 5 else "",
        )
    return alphabet


def _encoded(document: str | np.ndarray, vocabulary: Vocabulary) -> Document:
    return Document(*vocabulary.encode(document)) if isinstance(document, str) else Document(document)


def _python_topics() -> list[str]:
    """The topics of Python's `help`, in the order of their names, each paragraph only where it comes first.

    They repeat one another, and what is held out must not have been seen in training.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigurationError(
            "data.dataset: 'text' without data.root is Python's documentation, and this Python has none "
            "(pydoc_data is missing); give data.root, a file or a folder of texts."
        ) from error
    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        paragraphs = [one for one in dict.fromkeys(topics[name].split("\n\n")) if one.strip() not in seen]
        seen.update(one.strip() for one in paragraphs)
        documents.append("\n\n".join(paragraphs))
    return [document for document in documents if document.strip()]
