"""Saving beside the training: the loop is held for a copy of the tensors, and a thread writes that copy."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from disttrain.checkpoint.folder import Tensors
from disttrain.checkpoint.store import CheckpointStore


@dataclass(frozen=True)
class Outcome:
    """What became of the checkpoint of a step: where it is, or why it could not be written."""

    step: int
    path: Path | None
    error: OSError | None = None


class CheckpointWriter:
    """Writes checkpoints to a store, one at a time, on a thread of its own.

    Holds one copy of what it saves in memory, which every save uses again: mapping that much memory anew would take
    longer than the copying.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._under_way: Future[Outcome] | None = None
        self._model: dict[str, torch.Tensor] = {}
        self._optimizer: dict[str, torch.Tensor] = {}

    def save(self, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> Outcome | None:
        """Begin to write the checkpoint of `state["step"]`; what is passed may change as soon as this returns.

        Waits for the checkpoint before, and returns what became of it unless that has been told.
        """
        before = self.wait()
        _copy(model, self._model)
        _copy(optimizer, self._optimizer)
        self._under_way = self._thread.submit(self._write, dict(state))
        return before

    def poll(self) -> Outcome | None:
        """What became of the checkpoint under way, told once; None while it is being written."""
        return self.wait() if self._under_way is not None and self._under_way.done() else None

    def wait(self) -> Outcome | None:
        """Wait until nothing is being written; what became of the last checkpoint, unless that has been told."""
        if self._under_way is None:
            return None
        under_way, self._under_way = self._under_way, None
        return under_way.result()

    def close(self) -> None:
        """Finish what is being written, and end the thread."""
        self._thread.shutdown()

    def _write(self, state: dict[str, Any]) -> Outcome:
        try:
            return Outcome(state["step"], self._store.save(self._model, self._optimizer, state))
        except OSError as error:
            return Outcome(state["step"], None, error)


def _copy(tensors: Tensors, into: dict[str, torch.Tensor]) -> None:
    """Bring `into` to hold what `tensors` holds, in memory of its own on the CPU."""
    for name in into.keys() - tensors.keys():
        del into[name]
    for name, tensor in tensors.items():
        copy = into.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = into[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
