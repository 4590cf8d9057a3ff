"""The weights of a checkpoint for other programs: one safetensors file, or several with the index of Hugging Face."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from disttrain.checkpoint.folder import Checkpoint, write_file
from disttrain.checkpoint.stored import outline_of
from disttrain.checkpoint.tensors import safetensors_pieces
from disttrain.errors import ConfigurationError, UsageError, brief
from disttrain.files import being_written, fsync
from disttrain.layout import MODEL

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_METADATA = {"format": "pt"}  # transformers refuses a file without it


def export_weights(checkpoint: Checkpoint, folder: Path, max_bytes: float = math.inf) -> list[str]:
    """Write the weights into a new or empty folder, one tensor in memory at a time; returns the names of the files.

    If they have more than `max_bytes`, they are divided among several files, of which only one with a single tensor is
    larger, and an index says which has which. Tied weights are there once, under their first name.

    Raises UsageError for a folder that is not new, ConfigurationError if it cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists, and is not an empty folder: name a new one.")
    shared = checkpoint.state.get("shared", {})
    outlines = {name: one for name, one in outline_of(checkpoint.model).items() if name not in shared}
    sizes = {name: one.numel() * one.element_size() for name, one in outlines.items()}
    files = _divided(sizes, max_bytes)
    # The current folder, or where a disk is mounted, cannot be replaced.
    is_there = folder.exists()
    temporary = folder / ".writing" if is_there else being_written(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)  # links are followed: the user has named it
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for file, names in files.items():
            pieces = safetensors_pieces(checkpoint.model, {name: outlines[name] for name in names}, _METADATA)
            write_file(temporary / file, pieces)
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_file(temporary / f"{MODEL}.index.json", [memoryview(f"{json.dumps(index, indent=2)}\n".encode())])
        fsync(temporary)
        if not is_there:
            temporary.rename(folder)
        else:
            for path in sorted(temporary.iterdir()):  # an index comes last
                path.rename(folder / path.name)
            fsync(folder)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {brief(error)}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(path.name for path in folder.iterdir())


def size_in_bytes(text: str) -> float:
    """The bytes of a size such as "5GB" or "500 MiB". Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)", text.strip().upper())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"'{brief(text)}' is not a valid size: give a number and its unit, as in 5GB or 500MB")
    return float(found[1]) * _UNITS[found[2]]


def _divided(sizes: Mapping[str, int], max_bytes: float) -> dict[str, list[str]]:
    """The names by file, in their order: as many in each as fit."""
    groups: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {MODEL: groups[0]}
    stem, _, ending = MODEL.partition(".")
    return {f"{stem}-{number:05d}-of-{len(groups):05d}.{ending}": names for number, names in enumerate(groups, 1)}
