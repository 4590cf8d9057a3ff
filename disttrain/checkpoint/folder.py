"""One checkpoint: a folder of tensors (safetensors) and state (JSON), with a manifest that vouches for each file.

    step-00000500/model.safetensors       the model's state dict, by its own names
                  optimizer.safetensors   the optimizer's tensors, as PARAMETER.NAME
                  state.json              step, best metric, optimizer options, recipe, what the run rests on
                  manifest.json           size and SHA-256 of each file; written last

Nothing in it is a pickle, so reading one runs no code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from disttrain.checkpoint.check import check_state
from disttrain.errors import ConfigurationError, brief
from disttrain.faultpoints import reached

MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
_CONTENTS = (MODEL, OPTIMIZER, STATE)
_FORMAT = 1

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, on the CPU."""

    path: Path
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


def write_checkpoint(path: Path, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> None:
    """Write the folder `path` so that it is there whole or not at all.

    Everything is written and fsynced under a temporary name, the manifest last; then the folder is renamed and its
    parent fsynced. Raises OSError, with nothing left behind, if any of that fails.
    """
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(_with_memory_of_their_own(model), temporary / MODEL)
        save_file(_with_memory_of_their_own(optimizer), temporary / OPTIMIZER)
        reached("checkpoint: tensors", step=state["step"])
        (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        files = {name: _fingerprint(temporary / name) for name in _CONTENTS}
        manifest = {"format": _FORMAT, "step": state["step"], "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name in (*_CONTENTS, MANIFEST):
            _fsync(temporary / name)
        _fsync(temporary)
        reached("checkpoint: written", step=state["step"])
        temporary.rename(path)
        reached("checkpoint: named", step=state["step"])
        _fsync(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        raise


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest. Raises ConfigurationError that names the first that differs."""
    manifest = _read_json(path / MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") != _FORMAT or not isinstance(files, dict) or set(files) != set(_CONTENTS):
        raise ConfigurationError(f"{path / MANIFEST} is not a manifest of format {_FORMAT}.")
    for name, expected in files.items():
        try:
            found = _fingerprint(path / name)
        except OSError as error:
            raise ConfigurationError(f"{path / name} cannot be read: {error.strerror or error}.") from error
        if found != expected:
            raise ConfigurationError(f"{path / name} is not what was written: its size or SHA-256 differs.")


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify the folder `path` and read it. Raises ConfigurationError if it is damaged."""
    verify_checkpoint(path)
    try:
        model, optimizer = load_file(path / MODEL), load_file(path / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{path}: the tensors cannot be read: {brief(error)}.") from error
    state = _read_json(path / STATE)
    check_state(state, path / STATE)
    return Checkpoint(path, model, optimizer, state)


def weights_sha256(model: Tensors) -> str:
    """One SHA-256 over the weights: name, type, shape and bytes of each tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _with_memory_of_their_own(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors as safetensors takes them: contiguous, and none sharing memory with another, as tied weights do."""
    separate = {}
    taken = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in taken:
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _fingerprint(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe or a device might never end
        raise FileNotFoundError(errno.ENOENT, "there is no such file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} does not hold a JSON object.")
    return content


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
