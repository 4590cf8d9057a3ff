"""Weights from files that are not a checkpoint of ours: safetensors, alone or several in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from disttrain.errors import ConfigurationError, brief
from disttrain.files import parse_json, read_text, refuse_irregular, utf8_name
from disttrain.layout import MODEL

_PICKLES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar"})
_ENDING = ".safetensors"
# What wrappers put in front of every name: DistributedDataParallel, torch.compile.
_PREFIXES = ("module.", "_orig_mod.")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of those of a folder or an index, on the CPU, without wrappers' prefixes.

    A folder is read as `transformers` writes one: `model.safetensors`, or what `model.safetensors.index.json` names.
    Raises ConfigurationError if there is no such file, or one that cannot be read.
    """
    if path.suffix.lower() in _PICKLES:
        raise ConfigurationError(
            f"{path} is a pickle, and loading one can run arbitrary code: save the weights with "
            "safetensors.torch.save_file, and name that file."
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in _files(path):
        try:
            refuse_irregular(file, follow=True)  # the library would wait for the writer of a pipe
            with utf8_name(file) as name:
                tensors |= load_file(name)
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"{file} cannot be read as safetensors: {brief(error)}.") from error
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise ConfigurationError(f"{path} does not exist; give a run, a checkpoint, or a safetensors file.")
        return _named_in(path) if path.name.endswith(f"{_ENDING}.index.json") else [path]
    if (path / MODEL).is_file():
        return [path / MODEL]
    index = path / f"{MODEL}.index.json"
    if index.is_file():
        return _named_in(index)
    found = sorted(path.glob(f"*{_ENDING}"))
    if len(found) == 1:
        return found
    pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in _PICKLES)
    if pickles and not found:
        raise ConfigurationError(
            f"{path} holds no {MODEL}, and {pickles[0]} is a pickle, which can run arbitrary code when it is loaded: "
            "save the weights with safetensors.torch.save_file."
        )
    what = f"several: {', '.join(file.name for file in found[:4])}; name one" if found else "none"
    raise ConfigurationError(f"{path} should hold a run, a checkpoint, or {MODEL}; of safetensors files it has {what}.")


def _named_in(index: Path) -> list[Path]:
    try:
        content: Any = parse_json(read_text(index))
        names = sorted(set(content["weight_map"].values()))
        if any(Path(name).name != name or not name.endswith(_ENDING) for name in names):
            raise ValueError("it names other files than those beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{index} is not an index of safetensors files: {brief(error)}.") from error
    return [index.parent / name for name in names]
