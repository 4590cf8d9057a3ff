"""The data set `text`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.data.dataset import SampleSet, SampleSets
from disttrain.data.sources.text import load_text
from disttrain.data.vocabulary import vocabulary_of
from disttrain.errors import ConfigurationError
from disttrain.recipe import DataRecipe


def load(root: Path | str | None = None, **options: Any) -> SampleSets:
    given = {} if root is None else {"root": str(root)}
    return load_text(DataRecipe(dataset="text", options=options, **given))


def samples(split: SampleSet) -> list[dict[str, Any]]:
    return [split.dataset[index] for index in range(len(split))]


def texts(split: SampleSet) -> list[str]:
    """The documents, put together from the samples of a packed set."""
    tokens = [sample["tokens"] for sample in samples(split)]
    stream = torch.cat([tokens[0], *(one[1:] for one in tokens[1:])]).tolist()
    end, vocabulary = split.facts["end_of_text"], vocabulary_of(split.facts)
    assert vocabulary is not None
    assert stream[0] == stream[-1] == end
    found: list[list[int]] = []
    for token in stream[:-1]:
        if token == end:
            found.append([])
        else:
            found[-1].append(token)
    return [vocabulary.decode(one) for one in found]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def test_the_embedded_texts_are_there_and_no_paragraph_is_in_both_parts() -> None:
    sets = load()
    train, test = ("\n\n".join(texts(split)) for split in (sets.train, sets.test))
    assert len(train) > 300_000
    assert 0.08 < len(test) / (len(train) + len(test)) < 0.101
    long = {paragraph.strip() for paragraph in train.split("\n\n") if len(paragraph) > 40}
    assert len(long) > 1000
    assert not long & {paragraph.strip() for paragraph in test.split("\n\n")}
    assert 100 <= sets.train.facts["vocab_size"] == len(sets.train.facts["characters"]) + 1
    assert sets.train.facts["context_length"] == 128
    assert sets.train.facts == sets.test.facts


@pytest.mark.parametrize("tokens", ["characters", "bytes"])
def test_packing_loses_and_repeats_nothing(tmp_path: Path, tokens: str) -> None:
    documents = {f"{number:02}.txt": f"text {number} ä\n" * number for number in range(1, 13)}
    sets = load(write(tmp_path, documents), tokens=tokens, context_length=16)
    found = texts(sets.train) + texts(sets.test)
    assert sorted(found) == sorted(documents.values())
    assert texts(sets.train) == sorted(texts(sets.train), key=len), "in the order of the files' names"
    assert all(len(sample["tokens"]) == 17 for sample in samples(sets.train)[:-1])
    for split in (sets.train, sets.test):
        num_bytes = sum(sample["num_bytes"] for sample in samples(split))
        assert num_bytes == sum(len(text.encode()) for text in texts(split))


def test_padding_makes_a_sample_of_each_document(tmp_path: Path) -> None:
    sets = load(
        write(tmp_path, {"a.txt": "abc", "b.txt": "ä" * 9, "c.txt": "abca", "t.txt": "cä"}),
        test_files="t*",
        layout="padded",
        context_length=4,
    )
    end = sets.train.facts["end_of_text"]
    assert [sample["tokens"].tolist() for sample in samples(sets.train)] == [
        [end, 0, 1, 2, end],
        [end, 3, 3, 3, 3],  # cut to as much as the model takes, and one to predict
        [end, 0, 1, 2, 0],
    ]
    assert [sample["num_bytes"] for sample in samples(sets.train)] == [3, 8, 4]
    assert [sample["tokens"].tolist() for sample in samples(sets.test)] == [[end, 2, 3, end]]


def test_files_are_found_once_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(
        tmp_path / "texts",
        {
            "b.txt": "bb", "a/z.txt": "zz", "a.md": "aa", "c.py": "python", ".hidden.txt": "hidden",
            ".git/x.txt": "git",
            "empty.txt": "", "a/t.txt": "tt",
        },
    )  # fmt: skip
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    (root / "again.txt").symlink_to(root / "b.txt")
    os.mkfifo(root / "pipe.txt")
    expected = ["aa", "zz", "bb"]
    assert texts(load(root, test_files="a/t*").train) == expected
    listed = os.scandir

    def backwards(path: Any) -> list[os.DirEntry[str]]:
        return list(listed(path))[::-1]

    monkeypatch.setattr(os, "scandir", backwards)
    assert texts(load(root, test_files="a/t*").train) == expected
    assert texts(load(root, files=["*.py", "a.md"], test_files="*.py").train) == ["aa"]


def test_the_end_of_a_single_text_is_held_out(tmp_path: Path) -> None:
    text = "".join(chr(97 + number % 26) for number in range(1000))
    sets = load(write(tmp_path, {"one.txt": "\ufeff" + text}) / "one.txt", test_fraction=0.25)
    assert texts(sets.train) == [text[:750]]
    assert texts(sets.test) == [text[750:]], "without the byte order mark, which is not text"


def test_a_character_of_the_test_part_alone_is_part_of_the_alphabet(tmp_path: Path) -> None:
    sets = load(write(tmp_path, {"one.txt": "a" * 95 + "xxxxx"}), test_fraction=0.05)
    assert sets.train.facts["characters"] == "ax"
    assert texts(sets.test) == ["xxxxx"]


def test_a_model_is_evaluated_on_other_texts_by_the_tokens_that_it_was_trained_on(tmp_path: Path) -> None:
    facts = load(write(tmp_path, {"one.txt": "abcdef" * 20}) / "one.txt").train.facts
    data = DataRecipe(dataset="text", root=str(write(tmp_path, {"two.txt": "fed" * 20}) / "two.txt"))
    sets = load_text(data, facts)
    assert sets.test.facts == facts
    assert sets.test.dataset[0]["tokens"].tolist() == [6, *[5, 4, 3] * 2, 6]
    write(tmp_path, {"two.txt": "fez" * 20})
    with pytest.raises(ConfigurationError, match="the character 'z'"):
        load_text(data, facts)


def test_bytes_need_be_no_text(tmp_path: Path) -> None:
    (tmp_path / "any.bin").write_bytes(bytes(range(256)) * 10)
    sets = load(tmp_path / "any.bin", tokens="bytes")
    tokens = torch.cat([sample["tokens"][1:] for sample in samples(sets.train)])[:-1]
    assert bytes(tokens.tolist()) == (bytes(range(256)) * 10)[:2304]
    assert not isinstance(sets.train.dataset.documents[0].tokens.base, bytes), "it is mapped, not read"


def test_the_digest_shows_another_text(tmp_path: Path) -> None:
    def digest(text: str, **options: Any) -> str | None:
        sets = load(write(tmp_path, {"one.txt": text}), **options)
        contents: str | None = sets.train.dataset.training_digest().contents
        return contents

    text = "some words, and more of them; " * 5
    assert digest(text) == digest(text) != digest(text.replace("some", "mose"))
    assert digest(text, context_length=7) != digest(text)


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        (
            {"a.txt": "ok " * 50, "b.txt": "ok\udcff!"},
            {},
            r"^data.root: .*b.txt is not UTF-8: byte 0xff at offset 2; .*files",
        ),
        ({"a.txt": ""}, {}, "all 1 files in .* are empty"),
        ({"a.pdf": "x"}, {}, r"matches \*.txt or \*.md or \*.rst; set data.options.files"),
        ({"a.txt": "x"}, {}, "0.1 of 1 characters in 1 documents leaves one of the parts empty"),
        ({"a.txt": "x"}, {"test_files": "b*"}, "matches none of the 1 files"),
        ({"a.txt": "x"}, {"test_files": ["*"]}, "matches all of the 1 files"),
        ({"a.txt": "x"}, {"contextlength": 3}, "no such option of 'text'; did you mean context_length?"),
        ({"a.txt": "x"}, {"context_length": 0}, "0 is not a whole number of 1 or more"),
        ({"a.txt": "x"}, {"test_fraction": 1}, "1 is not a number between 0 and 1"),
        ({"a.txt": "x"}, {"layout": "nested"}, "'nested' is not 'packed' or 'padded'"),
        ({"a.txt": "x"}, {"files": []}, r"\[\] is not a pattern"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, files: dict[str, str], options: dict[str, Any], words: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigurationError, match=words) as caught:
        load(tmp_path, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_a_root_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="pipe cannot be read: it is a named pipe, not a file"):
        load(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match=r"give data\.root"):
        load(test_files="*")
