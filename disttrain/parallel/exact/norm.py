"""The norm of sharded gradients, to the bits that it has of whole ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disttrain.distributed.collectives import deal_out, sum_
from disttrain.distributed.sharded import local
from disttrain.parallel.exact.sharded import rows_of_all
from disttrain.parallel.mesh import ShardMesh


@torch.no_grad()
def norm_of_whole(gradients: Sequence[torch.Tensor], mesh: ShardMesh) -> torch.Tensor:
    """The 2-norm, (), of gradients sharded on `mesh` as `torch.nn.utils.get_total_norm` has it of whole ones.

    A sum of squares depends on how it is cut. So each gradient is put together on one rank, which computes its norm;
    all ranks have some, of about as many numbers. Every rank must call it, with gradients of the same shapes.
    """
    if not gradients:
        return torch.tensor(0.0)
    size, first = mesh.shard_size, mesh.replica * mesh.shard_size
    owners = _owners([gradient.numel() for gradient in gradients], size * mesh.num_replicas)
    of_ranks = [[index for index, owner in enumerate(owners) if owner == first + part] for part in range(size)]
    mine = of_ranks[mesh.part]
    shapes = [gradients[index].shape for index in mine]
    # By rank of this replica, the numbers that it has of each gradient that is put together here.
    sizes = [[_size_on(part, shape, size) for shape in shapes] for part in range(size)]
    nothing = local(gradients[0]).reshape(-1)[:0]  # beside few gradients, a whole replica may have none to put together
    received = deal_out(
        [[nothing, *(local(gradients[index]) for index in of_rank)] for of_rank in of_ranks],
        [sum(of_rank) for of_rank in sizes],
        mesh.shard_group,
    )
    cut = [torch.split(part, of_rank) for part, of_rank in zip(received, sizes, strict=True)]
    wholes = [torch.cat([of_rank[index] for of_rank in cut]).view(shape) for index, shape in enumerate(shapes)]
    norms = torch.zeros(len(gradients), dtype=torch.float64, device=gradients[0].device)
    if wholes:
        norms[mine] = torch.stack(torch._foreach_norm(wholes, 2.0)).double()
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
