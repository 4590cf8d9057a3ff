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
