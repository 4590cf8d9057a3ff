"""A copy of tensors that a step may change, taken while the next step is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from disttrain.checkpoint.tensors import Tensors
from disttrain.distributed.sharded import local

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Snapshot:
    """One copy, on the CPU, of all that a checkpoint holds, in the same memory each time.

    `begin` copies what may change at any time, such as buffers, and `copy_the_rest` what only an optimizer's step
    changes: that may run on another thread, beside a forward and backward pass. `changed` then returns whether the pass
    has left them alone. A GPU copies by itself, on a stream of its own: there `copy_the_rest` waits until it is done.
    """

    def __init__(self) -> None:
        self.model: dict[str, torch.Tensor] = {}
        self.optimizer: dict[str, torch.Tensor] = {}
        self._rest: list[tuple[str, torch.Tensor, torch.Tensor, int]] = []  # name, copy, original and its version
        self._stream: torch.cuda.Stream | None = None
        self._gpu_is_done: torch.cuda.Event | None = None

    def begin(self, model: Tensors, optimizer: Tensors, steady: frozenset[int]) -> None:
        """Copy all but the tensors whose `data_ptr` is in `steady`, which are left to `copy_the_rest`."""
        self._rest = []
        pairs = [*_pairs(model, self.model), *_pairs(optimizer, self.optimizer)]
        changing = []
        for name, copy, original in pairs:
            if original.data_ptr() in steady:
                self._rest.append((name, copy, original, original._version))
            elif original.is_cuda:
                changing.append((copy, original))
            else:
                copy.copy_(original)
        self._copy_on_gpu(changing, [(copy, original) for _, copy, original, _ in self._rest if original.is_cuda])

    def _copy_on_gpu(
        self, changing: Sequence[tuple[torch.Tensor, torch.Tensor]], steady: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Have the GPU copy beside what it is given next, once it has done what it was given before.

        It does nothing else until it has copied what is `changing`. What is `steady` is left alone by what it is given
        until `copy_the_rest` has returned.
        """
        if not (changing or steady):
            self._gpu_is_done = None
            return
        current = torch.cuda.current_stream((changing or steady)[0][1].device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(current.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for pairs in (changing, steady):
                for copy, original in pairs:
                    copy.copy_(original, non_blocking=True)
                    original.record_stream(self._stream)  # else its memory could be given to another tensor meanwhile
                if pairs is changing:
                    current.wait_stream(self._stream)
            self._gpu_is_done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._gpu_is_done.record(self._stream)

    def copy_the_rest(self) -> None:
        """Copy what `begin` has left. Lets other threads run, and takes no other thread's time for it."""
        if self._gpu_is_done is not None:
            self._gpu_is_done.synchronize()
        for _, copy, original, _ in self._rest:
            if original.is_cuda:
                continue
            # NumPy copies on this thread alone. PyTorch would divide each tensor among a team of threads that wait
            # for each other: on busy cores that took four to ten times as long.
            np.copyto(_as_array(copy), _as_array(original))

    def changed(self, *, to_the_bit: bool = False) -> str | None:
        """The name of a tensor that was changed while `copy_the_rest` may have been reading it; None if none was.

        PyTorch counts the changes that it sees; those made behind its back (`weight.data`) show up `to_the_bit`.
        """
        for name, copy, original, version in self._rest:
            if original._version != version:
                return name
            if to_the_bit and not _have_same_bits(copy, original):
                return name
        return None


def _pairs(tensors: Tensors, copies: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Bring `copies` to hold room for what `tensors` holds: each name with its copy and its original."""
    for name in copies.keys() - tensors.keys():
        del copies[name]
    for name, tensor in tensors.items():
        copy = copies.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copies[name] = copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        yield name, copy, tensor.detach()


def _have_same_bits(copy: torch.Tensor, original: torch.Tensor) -> bool:
    if original.is_cuda:
        integers = _INTEGERS[original.element_size()]
        return torch.equal(copy.to(original.device).view(integers), original.view(integers))
    return np.array_equal(_as_array(copy), _as_array(original))


def _as_array(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """The same memory as integers of the same width: NumPy lacks some of PyTorch's types."""
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = tensor.view(_INTEGERS[tensor.element_size()]).numpy()
    return array


def addresses(optimizer: torch.optim.Optimizer) -> frozenset[int]:
    """Where the tensors are that only its step changes: the parameters and their state, or this rank's parts."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: list[Mapping[str, object]] = list(optimizer.state.values())
    values = [value for entries in state for value in entries.values() if isinstance(value, torch.Tensor)]
    return frozenset(local(tensor.detach()).data_ptr() for tensor in (*parameters, *values))
