"""Tensors of which each rank holds a part (DTensor), beside ordinary ones, which every rank holds whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from disttrain.distributed.world import World


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each rank holds a part of it only."""
    return hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, which may be empty, in the same memory; any other as it is."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, on every rank: every rank must call it. Any other tensor as it is."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole `tensor`, which this rank has, cut as `like` is; as it is if that is not sharded. Nothing is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def gathered(world: World, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tensors on rank 0, on the CPU if they were sharded, collected one after the other; none on the others.

    Every rank must call it.
    """
    found = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if world.is_main:
            found[name] = complete.cpu() if is_sharded(tensor) else complete
    return found
