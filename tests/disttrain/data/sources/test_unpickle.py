"""The restricted reader: real files come through, and nothing that a pickle asks for is run."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.data.sources.unpickle import read_pickle
from disttrain.errors import ConfigurationError
from tests.disttrain.data.sources.cifar_files import a_dict, batch, matrix, string

PIXELS = np.arange(600, dtype=np.uint8).reshape(2, 300)


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    return path


def test_what_python_2_wrote(tmp_path: Path) -> None:
    table = read_pickle(written(tmp_path, batch(PIXELS, [3, 4])))
    assert table["labels"] == [3, 4]
    assert np.array_equal(table["data"], PIXELS)
    assert table["data"].dtype == np.uint8


def test_numpys_newer_name(tmp_path: Path) -> None:
    table = read_pickle(written(tmp_path, a_dict({"data": matrix(PIXELS, b"numpy._core.multiarray")})))
    assert np.array_equal(table["data"], PIXELS)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array", [PIXELS, PIXELS[::-1], np.asfortranarray(PIXELS), np.arange(5, dtype=">i4"), np.array([0.5, np.inf])]
)
def test_what_numpy_writes_today(tmp_path: Path, protocol: int, array: np.ndarray[Any, Any]) -> None:
    table = read_pickle(written(tmp_path, pickle.dumps({"data": array, "labels": [1, 2], "name": "x"}, protocol)))
    assert np.array_equal(table["data"], array)
    assert table["data"].dtype == array.dtype
    assert (table["labels"], table["name"]) == ([1, 2], "x")


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


MARK = "disttrain-was-here"


def attacks() -> dict[str, bytes]:
    """Pickles that leave a file MARK in the current folder if anything of them is run."""
    command = f"touch {MARK}"
    shell = Calls(os.system, command)
    by_name = b"cbuiltins\n__import__\n" + string(b"os") + b"\x85R."
    dotted = b"\x80\x04\x8c\x05numpy\x8c\x11dtype.__class__.x\x93."
    through_numpy = b"\x80\x04\x8c\x05numpy\x8c\x11testing.run_tests\x93."
    code = Calls(eval, f"open({MARK!r}, 'w')")
    touch = Calls(Path.touch, Path(MARK))
    return {
        "shell": pickle.dumps(shell),
        "shell in protocol 0": pickle.dumps(shell, 0),
        "eval": pickle.dumps({"data": code}),
        "nested in labels": pickle.dumps({"labels": [1, [2, {"deep": shell}]], "data": PIXELS}),
        "as an argument of what is let in": pickle.dumps(Calls(np.dtype, shell)),
        "as an array's state": b"\x80\x02cnumpy\nndarray\n)R"
        + b"cposix\nsystem\n"
        + string(command.encode())
        + b"\x85Rb.",
        "through a library": pickle.dumps(touch),
        "an import": b"\x80\x02" + by_name,
        "a dotted name": dotted,
        "a function of numpy": through_numpy,
        "inst opcode": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj opcode": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "object array": pickle.dumps({"data": np.array([shell, 1], dtype=object)}),
        "extension registry": b"\x80\x02\x82\x01.",
        "outside object": b"\x80\x02" + string(b"x") + b"Q.",
        "codec of its choice": b"\x80\x02c_codecs\nencode\n" + string(b"x") + string(b"zlib") + b"\x86R.",
        "change of a stand-in": b"\x80\x02cnumpy\ndtype\nN}" + string(b"__init__") + b"K\x01s\x86b.",
    }


@pytest.mark.parametrize("name", attacks())
def test_a_malicious_pickle_runs_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, attacks()[name])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="data_batch_1: "):
        read_pickle(path)
    assert not (tmp_path / MARK).exists()
    assert np.array_equal(read_pickle(written(tmp_path, pickle.dumps(PIXELS))), PIXELS)


def test_the_message_names_the_file_and_what_it_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, pickle.dumps({"data": Calls(os.system, "true")}))
    with pytest.raises(ConfigurationError) as caught:
        read_pickle(path)
    assert str(caught.value) == (
        f"{path}: refused: the file asks for {os.system.__module__}.system, and only NumPy arrays and plain values "
        "are allowed. Nothing was run; do not trust this file."
    )


@given(cut=st.integers(0, len(batch(PIXELS, [3, 4])) - 1))
def test_a_truncated_file_is_named(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.mktemp("cut"), batch(PIXELS, [3, 4])[:cut])
    with pytest.raises(ConfigurationError, match=r"data_batch_1: not a readable pickle \(.+\); replace the file"):
        read_pickle(path)


@given(st.binary(max_size=200))
def test_garbage_never_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = written(tmp_path_factory.mktemp("garbage"), b"\x80\x02" + content + b".")
    with contextlib.suppress(ConfigurationError):
        read_pickle(path)
