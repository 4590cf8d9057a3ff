"""A model's buffers: kept as they are while somebody else uses the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Leave every buffer as it was, the same tensors with the same values, whatever the block does to them."""
    places = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.clone() for _, _, buffer in places]
    try:
        yield
    finally:
        with torch.no_grad():
            for (module, name, buffer), value in zip(places, values, strict=True):
                # Only what has changed: an expanded buffer, for one, cannot be written to.
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.resize_(value.shape).copy_(value)
                module._buffers[name] = buffer


class BufferCopies:
    """A model's buffers as they were when `take` was called last: what a step that is not made must leave unchanged."""

    def __init__(self, model: nn.Module) -> None:
        # Looked up once: a walk through the modules costs more than what a step does with the buffers of a small model.
        self._places = [(module, name) for module in model.modules() for name in module._buffers]
        self._copies: list[torch.Tensor | None] = [None] * len(self._places)

    @torch.no_grad()
    def take(self) -> None:
        """Copy every buffer, into the memory of the copy before where it fits."""
        fitting: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, (module, name) in enumerate(self._places):
            buffer, copy = module._buffers[name], self._copies[index]
            if buffer is None:
                self._copies[index] = None
            elif copy is None or (copy.shape, copy.dtype, copy.device) != (buffer.shape, buffer.dtype, buffer.device):
                self._copies[index] = buffer.clone()
            else:
                fitting.append((copy, buffer))
        if fitting:
            torch._foreach_copy_([copy for copy, _ in fitting], [buffer for _, buffer in fitting])

    @torch.no_grad()
    def restore(self, *, only_non_finite: bool = False) -> None:
        """Put back what was copied; with `only_non_finite` only where a buffer holds a number that is not finite."""
        for (module, name), copy in zip(self._places, self._copies, strict=True):
            buffer = module._buffers[name]
            if only_non_finite and (buffer is None or buffer.isfinite().all()):
                continue
            if buffer is None or copy is None or buffer.shape != copy.shape:
                module._buffers[name] = None if copy is None else copy.clone()
            elif not torch.equal(buffer, copy):  # an expanded buffer, for one, cannot be written to
                buffer.copy_(copy)
