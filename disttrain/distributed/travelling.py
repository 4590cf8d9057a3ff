"""Objects as the tensors in which they travel.

Torch sends an object in two collectives, its size and then itself, and waits for each as long as it takes: of a machine
that is cut off, no closed connection would tell. Here most fit into what is sent first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import distributed_c10d

_CPU = torch.device("cpu")
_SIZE, _BEGINNING = 8, 4088  # bytes


def packed(value: Any) -> torch.Tensor:
    """The object as (size,) uint8."""
    raw: torch.Tensor = distributed_c10d._object_to_tensor(value, _CPU, None)[0]
    return raw


def unpacked(raw: torch.Tensor) -> Any:
    """The object of what `packed` gave."""
    return distributed_c10d._tensor_to_object(raw, raw.numel(), None)


def head_of(raw: torch.Tensor | None) -> torch.Tensor:
    """What is sent first of a packed object, of the same shape for each: its size, and its beginning."""
    head = torch.zeros(_SIZE + _BEGINNING, dtype=torch.uint8)
    if raw is not None:
        head[:_SIZE].view(torch.int64)[0] = raw.numel()
        beginning = raw[:_BEGINNING]
        head[_SIZE : _SIZE + beginning.numel()] = beginning
    return head


def size_in(head: torch.Tensor) -> int:
    """The size of the packed object that this is the head of, in bytes."""
    return int(head[:_SIZE].view(torch.int64)[0])


def all_in(head: torch.Tensor) -> torch.Tensor | None:
    """The packed object, if the head holds all of it."""
    size = size_in(head)
    return head[_SIZE : _SIZE + size] if size <= _BEGINNING else None
