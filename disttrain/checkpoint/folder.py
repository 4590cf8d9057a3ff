"""One checkpoint: a folder of tensors (safetensors) and state (JSON), with a manifest that vouches for each file.

    step-00000500/model.safetensors       the model's state dict, by its own names; shared tensors once
                  optimizer.safetensors   the optimizer's tensors, as PARAMETER.NAME; state.json names the parameters;
                                          averages of the weights, if there are any, as ema.NAME
                  state.json              step, best metric, optimizer options, recipe, environment fingerprint
                  manifest.json           size and SHA-256 of each file; written last

Of a sharded model each rank writes its rows of each tensor, in model.rank-00000.safetensors and so on; the manifest
then has the shape of each tensor, and the file (by rank) and the first row of each part.

Nothing in it is a pickle, so reading one runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from disttrain.checkpoint.check import check_state, with_current_names
from disttrain.checkpoint.stored import StoredTensors, stored_in_file, stored_in_parts
from disttrain.checkpoint.tensors import Tensors, as_bytes, safetensors_pieces
from disttrain.distributed.cores import usable_cores
from disttrain.errors import ConfigurationError, brief
from disttrain.faultpoints import reached
from disttrain.files import fsync, make_folder, open_to_read, parse_json, read_text
from disttrain.layout import MANIFEST, MODEL, OPTIMIZER, STATE, contents_of, shard_names

AVERAGE = "ema."
"""What the names of averages of weights begin with, among the optimizer's tensors."""
WRITING, REPLACED, RETIRED, LEAVING = "writing", "replaced", "retired", "leaving"
_CHUNK = 2**20  # hashed and written while it is in the CPU's cache


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, on the CPU, and where it is: a folder, or a URL. Stored tensors are read when needed."""

    path: Path | str
    model: Tensors
    optimizer: Tensors
    state: dict[str, Any]

    @property
    def averages(self) -> dict[str, torch.Tensor]:
        """The averages of the weights by their names; none if the run keeps none (`train.ema_decay`)."""
        return {name.removeprefix(AVERAGE): self.optimizer[name] for name in self.optimizer if name.startswith(AVERAGE)}

    def averaged(self) -> Checkpoint:
        """This one with the averages of its weights for the weights, where it has them: what the run evaluates.

        Raises ConfigurationError for an average that is of no weight.
        """
        model = dict(self.model)
        for name, average in self.averages.items():
            if name not in model or model[name].shape != average.shape:
                raise ConfigurationError(f"{self.path}: the average {brief(repr(name))} matches none of the weights.")
            model[name] = average.to(model[name].dtype)
        shared = _shared_in(model, self.state, self.path)
        return replace(self, model={**model, **{name: model[first] for name, first in shared.items()}})


def write_checkpoint(path: Path, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> None:
    """Write a checkpoint that this process has all of: see `commit_checkpoint`."""
    commit_checkpoint(path, state, lambda folder: write_tensors(folder, model, optimizer))


def write_tensors(folder: Path, model: Tensors, optimizer: Tensors) -> dict[str, Any]:
    """Write the files of whole tensors into a checkpoint's folder; what its manifest holds of them. Raises OSError."""
    files = {
        MODEL: write_file(folder / MODEL, safetensors_pieces(model)),
        OPTIMIZER: write_file(folder / OPTIMIZER, safetensors_pieces(optimizer)),
    }
    return {"format": 1, "files": files}


def commit_checkpoint(
    path: Path,
    state: Mapping[str, Any],
    write: Callable[[Path], dict[str, Any]],
    guard: Callable[[], object] = lambda: None,
) -> None:
    """Write the folder `path` so that it is there whole or not at all, also after a power failure.

    `write` writes the files of tensors into a folder, and returns what the manifest holds of them. Each file is
    written under a temporary name of the folder and fsynced, the manifest last; then the folder is renamed and its
    parent fsynced. One that is there already stands until the new one takes its place. `guard` is called before that.
    Raises OSError, with nothing left behind, if any of that fails.
    """
    step = state["step"]
    temporary = hidden(path, WRITING)
    shutil.rmtree(temporary, ignore_errors=True)
    _make_folder(temporary)
    try:
        reached("checkpoint: begun", step=step)
        manifest = {"format": 0, "step": step, **write(temporary)}
        reached("checkpoint: tensors", step=step)
        manifest["files"] = {**manifest["files"], STATE: _write_json(temporary / STATE, state)}
        reached("checkpoint: state", step=step)
        _write_json(temporary / MANIFEST, manifest)
        fsync(temporary)
        reached("checkpoint: written", step=step)
        guard()
        _put_in_place(temporary, path, step)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(temporary: Path, path: Path, step: int) -> None:
    """Give the folder its name. One of that name is moved away first, since a folder cannot be renamed over another."""
    aside = hidden(path, REPLACED)
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        reached("checkpoint: moved away", step=step)
    try:
        temporary.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise
    reached("checkpoint: named", step=step)
    fsync(path.parent)
    reached("checkpoint: durable", step=step)
    shutil.rmtree(aside, ignore_errors=True)


def hidden(path: Path, stage: str) -> Path:
    """What the checkpoint `path` is called at a stage of its life in which it is none: WRITING, REPLACED, RETIRED;
    LEAVING is a copy that is on its way to a URL."""
    return path.with_name(f".{path.name}.{stage}")


def verify_checkpoint(path: Path, *, threads: int = 1) -> None:
    """Compare every file with the manifest. Raises ConfigurationError that names the first that differs."""
    manifest, names = _read_manifest(path)

    def verify(name: str) -> None:
        try:
            found = _fingerprint(path / name)
        except OSError as error:
            raise ConfigurationError(f"{path / name} cannot be read: {error.strerror or error}.") from error
        if found != manifest["files"][name]:
            raise ConfigurationError(f"{path / name} is not what was written: its size or SHA-256 differs.")

    with ThreadPoolExecutor(threads) as pool:  # a digest leaves Python's lock to others
        for _ in pool.map(verify, names):  # in order
            pass


def _read_manifest(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The manifest, and the names of the files that it lists."""
    manifest = _read_json(path / MANIFEST)
    names = contents_of(manifest)
    if names is None:
        raise ConfigurationError(f"{path / MANIFEST} is not a manifest of format 1 or 2.")
    return manifest, names


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify the folder `path` and open it. Raises ConfigurationError if it is damaged."""
    verify_checkpoint(path, threads=usable_cores())
    return open_checkpoint(path)


def open_checkpoint(path: Path) -> Checkpoint:
    """As `read_checkpoint`, but for one that was verified, by this process or another."""
    manifest, _ = _read_manifest(path)
    model, optimizer = (_stored(path, file, manifest) for file in (MODEL, OPTIMIZER))
    state = with_current_names(_read_json(path / STATE))
    check_state(state, path / STATE)
    shared = _shared_in(model, state, path)
    return Checkpoint(path, model.with_aliases(shared), optimizer, state)


def identity_of(path: Path) -> str | None:
    """What tells the checkpoint `path` from any other, also from a copy; None if it cannot be read."""
    try:
        status = os.stat(path / MANIFEST)
        return f"{status.st_ino} {status.st_mtime_ns} {_fingerprint(path / MANIFEST)['sha256']}"
    except OSError:
        return None


def _stored(path: Path, file: str, manifest: Mapping[str, Any]) -> StoredTensors:
    if manifest["format"] == 1:
        return stored_in_file(path / file)
    tables = manifest.get("tensors")
    table = tables.get(file.partition(".")[0]) if isinstance(tables, dict) else None
    if not isinstance(table, dict):
        raise ConfigurationError(f"{path / MANIFEST} does not list the tensors of the {file.partition('.')[0]}.")
    names = shard_names(file, len(manifest["files"]) // 2)
    return stored_in_parts([path / name for name in names], table, path / MANIFEST)


def _shared_in(model: Tensors, state: Mapping[str, Any], path: Path | str) -> dict[str, str]:
    """Other names of some of the tensors: one that the model has under several is stored under the first."""
    shared: dict[str, str] = state.get("shared", {})
    lost = next((first for first in shared.values() if first not in model), None)
    if lost is not None:
        raise ConfigurationError(f"{path}: the tensor {brief(repr(lost))} is missing, and others share it.")
    return shared


def weights_sha256(model: Tensors) -> str:
    """One SHA-256 over the weights: name, type, shape and bytes of each tensor, in the order of the names.

    Of stored tensors one at a time is read, so it does not matter how they were cut.
    """
    digest = hashlib.sha256()
    for name in sorted(model):
        tensor = model[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def write_file(path: Path, pieces: Iterable[memoryview]) -> dict[str, Any]:
    """Write a file to the disk, hashing it on the way: its size and SHA-256, as the manifest holds them."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for piece in pieces:
            for begin in range(0, len(piece), _CHUNK):
                chunk = piece[begin : begin + _CHUNK]
                digest.update(chunk)
                file.write(chunk)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _write_json(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    return write_file(path, [memoryview(f"{json.dumps(content, indent=1)}\n".encode())])


def _make_folder(path: Path) -> None:
    """Make a folder in one that is on the disk by name: without that, a power failure would lose both."""
    is_new = not path.parent.is_dir()
    make_folder(path.parent)
    if is_new:
        fsync(path.parent.parent)
    path.mkdir()


def _fingerprint(path: Path) -> dict[str, Any]:
    with open_to_read(path) as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_text(path))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} does not hold a JSON object.")
    return content
