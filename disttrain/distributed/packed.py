"""Many tensors from one rank to all others, in few messages.

A message wakes several threads of every rank, which takes milliseconds where cores are busy, and a model with its
optimizer has hundreds of small tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from disttrain.distributed.collectives import broadcast_

_MOST_BYTES = 16 << 20  # of tensors that travel together


def empty_on_cpu(outline: torch.Tensor) -> torch.Tensor:
    """Room for a tensor of this shape, type and order in memory, which may be on the device "meta".

    From there `torch.empty_like` imports some 500 modules, SymPy among them (torch 2.14): half a second of a core.
    """
    return torch.empty_strided(outline.shape, outline.stride(), dtype=outline.dtype, device="cpu")


def broadcast_many(tensors: Sequence[torch.Tensor], source: int, *, keeps: bool) -> list[torch.Tensor]:
    """What rank `source` passes, in new memory on each other rank that `keeps` it; none on the rest.

    All are on the CPU, but those that the other ranks pass may be on the device "meta": they have the shapes and types.
    Every rank must call it.
    """
    is_source = torch.distributed.get_rank() == source
    received: list[torch.Tensor] = []
    for group in _groups(tensors):
        sizes = [one.nbytes for one in group]
        if is_source:
            parts = [_bytes(one) for one in group]
            together = torch.cat(parts) if len(parts) > 1 else parts[0]
        else:
            together = torch.empty(sum(sizes), dtype=torch.uint8)
        broadcast_(together, source)
        if keeps and not is_source:
            for one, part in zip(group, torch.split(together, sizes), strict=True):
                room = empty_on_cpu(one)
                whole = room if room.is_contiguous() else torch.empty(room.shape, dtype=room.dtype)
                _bytes(whole).copy_(part)
                received.append(room if whole is room else room.copy_(whole))
    return received


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Those of a tensor, in the order of its elements: its own memory if that is in this order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _groups(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """In their order, as many as travel together; one that is larger travels alone."""
    group: list[torch.Tensor] = []
    for tensor in tensors:
        if group and sum(one.nbytes for one in group) + tensor.nbytes > _MOST_BYTES:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group
