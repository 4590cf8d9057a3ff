"""Tensors of which each rank has one, collected or dealt out by rank 0. Every rank must call these, in one order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def gather_to_main(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What each rank passed, by rank, on the CPU of rank 0; none elsewhere. All pass one shape and type, any type."""
    mine = _as_bytes(tensor)
    rooms = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(mine, rooms, dst=0)
    return [_of_bytes(room, tensor) for room in rooms or []]


def scatter_from_main(tensors: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Of the `tensors` that rank 0 passes, one for each rank, this rank's, on the CPU. All have the form of `like`."""
    room = torch.empty(like.numel() * like.element_size(), dtype=torch.uint8)
    dist.scatter(room, [_as_bytes(tensor) for tensor in tensors] if dist.get_rank() == 0 else None, src=0)
    return _of_bytes(room, like)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _of_bytes(raw: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return raw.view(like.dtype).view(like.shape)
