"""What no recipe can hold, whatever the key: TOML could not store it, or it cannot be meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_DEEPEST = 32


def beyond_bounds(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The path and what is wrong of each value in `value` that is too large, too deep or not text."""
    if len(path) > _DEEPEST:
        yield path[:3], "is nested too deeply"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not _is_text(key):
                yield path, "has a key that is not text in UTF-8"
            else:
                yield from beyond_bounds(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from beyond_bounds(item, (*path, str(index)))
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield path, "should be a number of 64 bits"
    elif isinstance(value, str) and not _is_text(value):
        yield path, "should be text in UTF-8"


def _is_text(value: Any) -> bool:
    """Whether it can be written: bytes of a command line that are not UTF-8 arrive as lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
