"""A model's buffers: kept as they are while other code uses the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from disttrain.distributed.foreach import copy_all_


def places_of_buffers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a buffer is or may be: the module that holds it, and its name there."""
    # By `items`: the keys alone of a TorchScript module's cannot be iterated over.
    return [(module, name) for module in model.modules() for name, _ in module._buffers.items()]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two dense tensors are the same to the last bit; NaN is the same as itself, and any type will do."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    raw = [tensor.detach().resolve_conj().contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*raw)


def own_memory(model: nn.Module) -> None:
    """Give each number of an expanded buffer a place of its own: as it was, nothing could be written to it."""
    for module, name in places_of_buffers(model):
        buffer = module._buffers[name]
        if buffer is not None and _is_expanded(buffer):
            module._buffers[name] = buffer.contiguous()


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided


def _is_expanded(buffer: torch.Tensor) -> bool:
    if not _is_dense(buffer):
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Leave every buffer as it was, the same tensors with the same values, whatever the block does to them.

    A sparse one may be replaced, and is put back; what is in it counts as constant.
    """
    places = [(module, name, module._buffers[name]) for module, name in places_of_buffers(model)]
    values = [None if buffer is None or not _is_dense(buffer) else buffer.clone() for _, _, buffer in places]
    try:
        yield
    finally:
        with torch.no_grad():
            for (module, name, buffer), value in zip(places, values, strict=True):
                # Only what has changed: an expanded buffer, for one, cannot be written to.
                if buffer is not None and value is not None and not same_bits(buffer, value):
                    buffer.resize_(value.shape).copy_(value)
                module._buffers[name] = buffer


class BufferCopies:
    """A model's buffers as they were when `take` was called last: what a step that is not made must leave unchanged.

    What is in a sparse one counts as constant.
    """

    def __init__(self, model: nn.Module) -> None:
        # Looked up once: a walk through the modules costs more than what a step does with the buffers of a small model.
        self._places = places_of_buffers(model)
        self._copies: list[torch.Tensor | None] = [None] * len(self._places)

    def take(self) -> None:
        """Copy every buffer, into the memory of the copy before where it fits."""
        if self._places:
            self._copy()

    @torch.no_grad()
    def _copy(self) -> None:
        fitting: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, (module, name) in enumerate(self._places):
            buffer, copy = module._buffers[name], self._copies[index]
            if buffer is None or not _is_dense(buffer):
                self._copies[index] = buffer
            elif copy is None or (copy.shape, copy.dtype, copy.device) != (buffer.shape, buffer.dtype, buffer.device):
                self._copies[index] = buffer.clone()
            else:
                fitting.append((copy, buffer))
        copy_all_([copy for copy, _ in fitting], [buffer for _, buffer in fitting])

    @torch.no_grad()
    def restore_if(self, is_bad: torch.Tensor) -> bool:
        """Put back what was copied if `is_bad`, (), is 1, without a look at it; return whether that can be.

        It cannot for buffers that were replaced, sparse, expanded or elsewhere: then nothing is done.
        """
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for (module, name), copy in zip(self._places, self._copies, strict=True):
            buffer = module._buffers[name]
            if buffer is None and copy is None:
                continue
            if buffer is None or copy is None or not _is_dense(copy) or _is_expanded(buffer):
                return False
            if (copy.shape, copy.dtype, copy.device) != (buffer.shape, buffer.dtype, buffer.device):
                return False
            if buffer.device != is_bad.device:
                return False
            pairs.append((copy, buffer))
        for dtype in {buffer.dtype for _, buffer in pairs}:  # a few kernels for all of a type
            group = [(copy, buffer) for copy, buffer in pairs if buffer.dtype == dtype]
            copies, buffers = (torch.cat([one.reshape(-1) for one in side]) for side in zip(*group, strict=True))
            each = torch.split(torch.where(is_bad == 1, copies, buffers), [buffer.numel() for _, buffer in group])
            chosen = [one.view(buffer.shape) for one, (_, buffer) in zip(each, group, strict=True)]
            torch._foreach_copy_([buffer for _, buffer in group], chosen)
        return True

    @torch.no_grad()
    def restore(self, *, only_non_finite: bool = False) -> None:
        """Put back what was copied; with `only_non_finite` only where a buffer holds a number that is not finite."""
        for (module, name), copy in zip(self._places, self._copies, strict=True):
            buffer = module._buffers[name]
            if buffer is copy or (only_non_finite and (buffer is None or is_finite(buffer))):
                continue
            if buffer is None or copy is None or buffer.shape != copy.shape or not _is_dense(copy):
                module._buffers[name] = None if copy is None else copy.clone()
            elif not same_bits(buffer, copy):  # an expanded buffer, for one, cannot be written to
                buffer.copy_(copy)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every number in a dense tensor is finite; any type will do."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # float8 has no comparisons
    return bool(tensor.isfinite().all())
