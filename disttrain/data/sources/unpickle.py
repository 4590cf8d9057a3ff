"""Reads the pickles that CIFAR comes in without running anything that a pickle may ask for.

A pickle is a program: it may call whatever it names. This reader lets it name a few things only, and none of them is
the real one: each is a stand-in that collects an array's parts, checks them, and builds the array itself. So neither
Python's nor NumPy's own machinery ever acts on the file's word.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from disttrain.errors import ConfigurationError
from disttrain.files import open_to_read

_NUMBERS = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])


def read_pickle(path: Path) -> Any:
    """What the pickle at `path` holds: plain values and numeric arrays. Byte strings of Python 2 come as latin-1 text.

    Raises ConfigurationError, which names the file, if it is damaged or asks for anything else.
    """
    try:
        with open_to_read(path, follow=True) as file:
            return _arrays_built(_Unpickler(file, encoding="latin1").load())
    except _Refused as error:
        raise ConfigurationError(
            f"{path}: refused: the file asks for {error}, and only NumPy arrays and plain values are allowed. "
            "Nothing was run; do not trust this file."
        ) from None
    except Exception as error:  # a damaged pickle may raise anything
        raise ConfigurationError(
            f"{path}: not a readable pickle ({type(error).__name__}: {error}); replace the file."
        ) from error


class _Refused(Exception):
    """The pickle names or does something that is not let in."""


class _StandIn:
    """What a pickle gets for a name that it may use. Calling it makes an instance; it cannot be changed."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise _Refused(f"state for {type(self).__name__}")


class _Array(_StandIn):
    """In place of `numpy.ndarray` and of the function that makes an empty one: the state that follows is the array."""

    __slots__ = ("array",)

    def __init__(self, *arguments: Any) -> None:
        self.array: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.build(raw.encode("latin1") if isinstance(raw, str) else raw, dtype, shape, "F" if is_fortran else "C")

    def build(self, raw: Any, dtype: Any, shape: Any, order: Any) -> None:
        lengths = tuple(_of(int, length) for length in _of(tuple, shape))
        array = np.frombuffer(_of((bytes, bytearray), raw), dtype=_of(_Dtype, dtype).dtype)
        self.array = array.reshape(lengths, order="F" if order == "F" else "C")


class _BufferedArray(_Array):
    """In place of the function that protocol 5 names: it gets everything at once."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.build(*arguments)


class _Dtype(_StandIn):
    """In place of `numpy.dtype`: booleans, integers and floats."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, *flags: Any) -> None:
        if _of(str, name) not in _NUMBERS:
            raise _Refused(f"an array of {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise _Refused(f"the byte order {state[1]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Encode(_StandIn):
    """In place of `_codecs.encode`, which Python 3 names for byte strings in old protocols; latin-1 only."""

    __slots__ = ()

    def __new__(cls, text: Any, encoding: Any = "latin1") -> Any:
        if encoding not in ("latin1", "latin-1"):
            raise _Refused(f"the encoding {encoding!r}")
        return _of(str, text).encode("latin1")


_LET_IN = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _BufferedArray,
    ("numpy._core.numeric", "_frombuffer"): _BufferedArray,
    ("_codecs", "encode"): _Encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _LET_IN:
            raise _Refused(f"{module}.{name}")
        return _LET_IN[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Refused(f"the outside object {pid!r}")


def _of(kind: type[Any] | tuple[type[Any], ...], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"unexpected {type(value).__name__}")
    return value


def _arrays_built(value: Any) -> Any:
    """`value` with its stand-ins replaced: in a plain value, or one dictionary, list or tuple deep."""
    if isinstance(value, dict):
        return {key: _array_built(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_array_built(item) for item in value]
    return _array_built(value)


def _array_built(value: Any) -> Any:
    if not isinstance(value, _StandIn):
        return value
    if isinstance(value, _Array) and value.array is not None:
        return value.array
    raise ValueError("an array without content")
