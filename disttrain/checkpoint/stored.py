"""The tensors of a checkpoint in its files: whole, or cut by rows among several. Each is read when it is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from disttrain.checkpoint.tensors import TYPES, Tensors
from disttrain.errors import ConfigurationError, brief
from disttrain.files import refuse_irregular, utf8_name

_Header = tuple[tuple[int, ...], torch.dtype]  # shape and type


@dataclass(frozen=True)
class _Part:
    """Rows of a tensor in a file: those from `begin` of its first dimension on."""

    file: int
    begin: int
    num_rows: int


@dataclass(frozen=True)
class _Stored:
    name: str  # in the files
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[_Part, ...]  # in order, without gaps


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors by name, in files that are mapped to memory: they stay readable when their folder is removed.

    What is read may lie in the files' own memory. An alias is another name of a tensor.
    """

    def __init__(self, where: Path, files: Sequence[Any], stored: Mapping[str, _Stored]) -> None:
        """`where` is what messages name."""
        self._where, self._files, self._stored = where, files, dict(stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name, 0, None)

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def outline(self, name: str) -> torch.Tensor:
        """The tensor's shape and type, on the device "meta"."""
        stored = self._stored[name]
        return torch.empty(stored.shape, dtype=stored.dtype, device="meta")

    def rows(self, name: str, begin: int, end: int | None) -> torch.Tensor:
        """Some rows of a tensor, or with None for `end` all of it; nothing else is read.

        Raises ConfigurationError if it cannot be read.
        """
        stored = self._stored[name]
        try:
            if end is None and len(stored.parts) == 1:
                whole: torch.Tensor = self._files[stored.parts[0].file].get_tensor(stored.name)
                return whole
            end = stored.shape[0] if end is None else end
            found = []
            for part in stored.parts:
                first, last = max(begin, part.begin), min(end, part.begin + part.num_rows)
                if first < last:
                    rows = self._files[part.file].get_slice(stored.name)
                    found.append(rows[first - part.begin : last - part.begin])
        except SafetensorError as error:
            raise ConfigurationError(f"{self._where}: {brief(repr(name))} cannot be read: {brief(error)}.") from error
        if len(found) == 1:
            only: torch.Tensor = found[0]
            return only
        if not found:
            return torch.empty((0, *stored.shape[1:]), dtype=stored.dtype)
        return torch.cat(found)

    def with_aliases(self, aliases: Mapping[str, str]) -> StoredTensors:
        """The same with other names for some of the tensors: each with the name that it is stored under."""
        return StoredTensors(
            self._where, self._files, {**self._stored, **{alias: self._stored[name] for alias, name in aliases.items()}}
        )


def outline_of(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors' shapes and types, on the device "meta"; of stored ones nothing is read."""
    if isinstance(tensors, StoredTensors):
        return {name: tensors.outline(name) for name in tensors}
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def stored_in_file(path: Path) -> StoredTensors:
    """The tensors of a safetensors file. Raises ConfigurationError if it is none, or holds types that torch has not."""
    file = _opened(path)
    stored = {}
    for name, (shape, dtype) in _headers(file, path).items():
        stored[name] = _Stored(name, shape, dtype, (_Part(0, 0, shape[0] if shape else 1),))
    return StoredTensors(path, [file], stored)


def stored_in_parts(paths: Sequence[Path], table: Mapping[str, Any], where: Path) -> StoredTensors:
    """The tensors whose parts are in several files: `table` has the shape of each, and file and first row of each part.

    Raises ConfigurationError, with the manifest `where` it stands, for a table that does not fit the files.
    """
    files = [_opened(path) for path in paths]
    headers = [_headers(file, path) for file, path in zip(files, paths, strict=True)]
    stored = {}
    for name, entry in table.items():
        found = _assembled(name, entry, headers)
        if found is None:
            raise ConfigurationError(f"{where}: the parts of {brief(repr(name))} are not those that the files hold.")
        stored[name] = found
    unknown = next((name for header in headers for name in header if name not in stored), None)
    if unknown is not None:
        raise ConfigurationError(f"{where}: {brief(repr(unknown))} is in the files, and is not listed.")
    return StoredTensors(where, files, stored)


def _assembled(name: str, entry: Any, headers: Sequence[dict[str, _Header]]) -> _Stored | None:
    """A tensor whose parts are there and follow on each other without a gap; None if they do not, or it is no entry."""
    if not isinstance(entry, dict) or entry.keys() != {"shape", "parts"}:
        return None
    if not (_counts(entry["shape"]) and isinstance(entry["parts"], list) and all(map(_counts, entry["parts"]))):
        return None
    shape, at, dtypes, parts = tuple(entry["shape"]), 0, set(), []
    for numbers in entry["parts"]:
        if len(numbers) != 2 or numbers[0] >= len(headers) or name not in headers[numbers[0]] or numbers[1] != at:
            return None
        part_shape, dtype = headers[numbers[0]][name]
        num_rows = part_shape[0] if part_shape else 1
        if (part_shape[1:] if shape else part_shape) != shape[1:] or len(part_shape) != len(shape):
            return None
        parts.append(_Part(numbers[0], at, num_rows))
        dtypes.add(dtype)
        at += num_rows
    if len(dtypes) != 1 or at != (shape[0] if shape else 1):
        return None
    return _Stored(name, shape, dtypes.pop(), tuple(parts))


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**63 for one in value
    )


def _opened(path: Path) -> Any:
    try:
        refuse_irregular(path)  # the library would wait for the writer of a pipe
        with utf8_name(path) as name:
            return safe_open(name, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{path}: the tensors cannot be read: {brief(error)}.") from error


def _headers(file: Any, path: Path) -> dict[str, _Header]:
    """Shape and type of each tensor of a file."""
    found = {}
    names: list[str] = file.keys()
    for name in names:
        one = file.get_slice(name)
        if one.get_dtype() not in TYPES:
            raise ConfigurationError(f"{path}: {brief(repr(name))} is {one.get_dtype()}, which torch does not have.")
        found[name] = tuple(one.get_shape()), TYPES[one.get_dtype()]
    return found
