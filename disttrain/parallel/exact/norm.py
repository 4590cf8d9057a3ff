"""The norm of sharded gradients, to the bits that it has of whole ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disttrain.distributed.collectives import deal_out, sum_
from disttrain.distributed.sharded import local
from disttrain.distributed.world import World
from disttrain.parallel.exact.sharded import rows_of_all


@torch.no_grad()
def norm_of_whole(gradients: Sequence[torch.Tensor], world: World) -> torch.Tensor:
    """The 2-norm, (), of sharded gradients as `torch.nn.utils.get_total_norm` has it of whole ones.

    A sum of squares depends on how it is cut. So each gradient is put together on one rank, which computes its norm;
    all ranks have some, of about as many numbers. Every rank must call it, with gradients of the same shapes.
    """
    if not gradients:
        return torch.tensor(0.0)
    owners = _owners([gradient.numel() for gradient in gradients], world.size)
    mine = [gradient for gradient, owner in zip(gradients, owners, strict=True) if owner == world.rank]
    pieces = [
        [local(gradient) for gradient, owner in zip(gradients, owners, strict=True) if owner == rank]
        for rank in range(world.size)
    ]
    # By rank, the numbers that it has of each gradient that is put together here.
    sizes = [[_size_on(rank, gradient.shape, world.size) for gradient in mine] for rank in range(world.size)]
    received = deal_out(pieces, [sum(of_rank) for of_rank in sizes])
    cut = [torch.split(part, of_rank) for part, of_rank in zip(received, sizes, strict=True)]
    wholes = [
        torch.cat([of_rank[index] for of_rank in cut]).view(gradient.shape) for index, gradient in enumerate(mine)
    ]
    norms = torch.zeros(len(gradients), dtype=torch.float64, device=gradients[0].device)
    if wholes:
        places = [index for index, owner in enumerate(owners) if owner == world.rank]
        norms[places] = torch.stack(torch._foreach_norm(wholes, 2.0)).double()
    norm: torch.Tensor = torch.linalg.vector_norm(sum_(norms).to(gradients[0].dtype), 2.0)
    return norm


def _size_on(rank: int, shape: torch.Size, num_ranks: int) -> int:
    start, end = rows_of_all(shape[0], num_ranks)[rank]
    return (end - start) * shape[1:].numel()


def _owners(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """A rank for each size: the largest first, each for the rank that has least."""
    loads, owners = [0] * num_ranks, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners
