"""The norm of sharded gradients, to the bits that it has of whole ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disttrain.distributed.collectives import deal_out, sum_
from disttrain.distributed.sharded import local
from disttrain.parallel.exact.block import rows_of_all
from disttrain.parallel.mesh import ShardMesh

# A rank holds its part of so many numbers three times while they are put together.
_MOST_AT_ONCE = 1 << 23


@torch.no_grad()
def norm_of_whole(gradients: Sequence[torch.Tensor], mesh: ShardMesh) -> torch.Tensor:
    """The 2-norm, (), of gradients sharded on `mesh` as `torch.nn.utils.get_total_norm` has it of whole ones.

    A sum of squares depends on how it is cut. So each gradient is put together on one rank, which computes its norm;
    all ranks have some, of about as many numbers. Every rank must call it, with gradients of the same shapes.
    """
    if not gradients:
        return torch.tensor(0.0)
    norms = torch.zeros(len(gradients), dtype=torch.float64, device=gradients[0].device)
    for some in _at_a_time([gradient.numel() for gradient in gradients]):
        _put_norms(norms, gradients, some, mesh)
    norm: torch.Tensor = torch.linalg.vector_norm(sum_(norms).to(gradients[0].dtype), 2.0)
    return norm


def _put_norms(norms: torch.Tensor, gradients: Sequence[torch.Tensor], some: range, mesh: ShardMesh) -> None:
    """Put the norms of some gradients where they belong, each on one rank."""
    size, first = mesh.shard_size, mesh.replica * mesh.shard_size
    owners = _owners([gradients[index].numel() for index in some], size * mesh.num_replicas)
    of_ranks = [
        [index for index, owner in zip(some, owners, strict=True) if owner == first + part] for part in range(size)
    ]
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
    if wholes:
        norms[mine] = torch.stack(torch._foreach_norm(wholes, 2.0)).double()


def _at_a_time(sizes: Sequence[int]) -> list[range]:
    """Gradients of these sizes, in runs that follow each other: of `_MOST_AT_ONCE` numbers, or a single one."""
    runs, begin, num = [], 0, 0
    for index, size in enumerate(sizes):
        if num and num + size > _MOST_AT_ONCE:
            runs.append(range(begin, index))
            begin, num = index, 0
        num += size
    return [*runs, range(begin, len(sizes))]


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
