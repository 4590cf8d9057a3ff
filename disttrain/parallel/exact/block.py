"""Parameters of a sharded model whose gradients are dealt out together, and their sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from disttrain.distributed.collectives import deal_out, sum_
from disttrain.distributed.fixed_point import FixedPointSum
from disttrain.distributed.sharded import local
from disttrain.parallel.mesh import ShardMesh

Gradients = Sequence[torch.Tensor | None]


class Block:
    """Parameters whose gradients are dealt out together: those of a block, or of what is in none."""

    def __init__(self, model: nn.Module, sharded: Mapping[str, torch.Tensor], mesh: ShardMesh) -> None:
        """`sharded` are the parameters that can be trained, by their names in the model; `mesh` is how they are."""
        self.names = list(sharded)
        self._places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in sharded]
        self._mesh = mesh
        self.parts = [local(one.detach()) for one in sharded.values()]
        self._rows = [rows_of_all(one.shape[0], mesh.shard_size) for one in sharded.values()]
        self._sizes = [part.numel() for part in self.parts]
        self._shapes = [one.shape for one in sharded.values()]
        self._total: FixedPointSum | None = None
        self.whole: list[torch.Tensor] = []
        """The gathered parameters of the pass under way: their gradients arrive there."""
        self.versions: list[int] = []
        self.num_calls = self.num_left = 0
        """How often it was called in this pass, and how often gradients have come all the way back through it."""
        self.is_waiting = False
        """Whether gradients of this pass are still to be dealt out."""

    def enter(self) -> None:
        """To be called while the parameters are gathered."""
        self.whole = [getattr(module, name) for module, name in self._places]
        self.versions = self.versions or [parameter._version for parameter in self.whole]

    def take(self) -> list[torch.Tensor | None]:
        """The gradients that have arrived, which are then with the caller alone."""
        gradients = [parameter.grad for parameter in self.whole]
        for parameter in self.whole:
            parameter.grad = None
        return gradients

    def begin(self, largest: Mapping[str, float], num_slices: int) -> None:
        """Begin a sum on the grids of these magnitudes."""
        # Its integers, twice the bytes of a part, are there from the first slice to the end of the last, not longer.
        self._total = FixedPointSum(self.parts, [largest[name] for name in self.names], num_slices)

    def deal_out(self, gradients: Gradients) -> None:
        """Add a gradient, of one slice, of every worker of this replica: every rank must call it; None adds nothing."""
        assert self._total is not None, "a sum must have begun"
        size = self._mesh.shard_size
        pieces: list[list[torch.Tensor]] = [[] for _ in range(size)]
        for part, shape, gradient, rows in zip(self.parts, self._shapes, gradients, self._rows, strict=True):
            whole = part.new_zeros(shape) if gradient is None else gradient
            for rank, (start, end) in enumerate(rows):
                pieces[rank].append(whole[start:end])
        for received in deal_out(pieces, [sum(self._sizes)] * size, self._mesh.shard_group):
            self._total.add(torch.split(received, self._sizes))

    def sums(self) -> list[torch.Tensor]:
        """This worker's parts of the sums; what is not summed has any numbers. The sum is over then.

        Every rank must call it: the replicas' sums are added up, as integers.
        """
        assert self._total is not None, "a sum must have begun"
        integers, replicas = self._total.integers(), self._mesh.replica_group
        if replicas is not None and integers.numel():
            sum_(integers, replicas)
        into = [torch.empty_like(part) for part in self.parts]
        self._total.write(into)
        self._total = None
        return into


def rows_of_all(num_rows: int, num_ranks: int) -> list[tuple[int, int]]:
    """Which rows of a parameter each rank has, from the first up to the last, exclusive: as `torch.chunk` cuts."""
    size = -(-num_rows // num_ranks)
    return [(min(rank * size, num_rows), min((rank + 1) * size, num_rows)) for rank in range(num_ranks)]


def as_gradient(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient as the gradient of a sharded parameter, which is cut alike."""
    assert isinstance(parameter, DTensor)
    # As FSDP2 does it. `DTensor.from_local` takes longer, for each parameter, than the sum of a small one.
    return DTensor(part, parameter._spec, requires_grad=False)
