"""Tensors of which each rank holds a part (DTensor), beside ordinary ones, which every rank holds whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """The whole `tensor`, which this rank has, cut as `like` is, in memory of its own; as it is if that is not sharded.

    Nothing is sent.
    """
    if not is_sharded(like):
        return tensor
    rows = rows_of(like)
    return from_part(tensor[rows.start : rows.stop].clone(), like)


def rows_of(tensor: torch.Tensor) -> range:
    """Which rows of a sharded tensor, along its first dimension, this rank holds."""
    sharded: Any = tensor
    (axis,) = (axis for axis, placement in enumerate(sharded.placements) if placement.is_shard(0))
    most = -(-tensor.shape[0] // sharded.device_mesh.size(axis))
    begin = min(sharded.device_mesh.get_local_rank(axis) * most, tensor.shape[0])
    rows = range(begin, begin + local(tensor.detach()).shape[0])
    assert len(rows) == min(most, tensor.shape[0] - begin), "a tensor is cut as torch.chunk does it"
    return rows


@dataclass(frozen=True)
class Place:
    """Which part of a sharded tensor a rank has, and of how many ranks that have the same part it is which."""

    part: int
    copy: int
    num_copies: int


def place_of(tensor: torch.Tensor) -> Place:
    """This rank's part of a sharded tensor, among all parts and copies."""
    sharded: Any = tensor
    mesh, part, copy, num_copies = sharded.device_mesh, 0, 0, 1
    for axis, placement in enumerate(sharded.placements):
        if placement.is_shard():
            part = mesh.get_local_rank(axis)
        else:
            copy = copy * mesh.size(axis) + mesh.get_local_rank(axis)
            num_copies *= mesh.size(axis)
    return Place(part, copy, num_copies)


def from_part(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A sharded tensor of which this rank's part is `part`, cut as `like` is. Nothing is sent."""
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        part.to(like.device), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


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
