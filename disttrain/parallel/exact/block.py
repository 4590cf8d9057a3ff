"""Parameters of a sharded model whose gradients are dealt out together, and their sums."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from disttrain.distributed.collectives import sum_
from disttrain.distributed.fixed_point import FixedPointSum
from disttrain.distributed.runs import Run, cut, runs_of
from disttrain.distributed.sharded import local
from disttrain.parallel.exact.dealing import Dealer, together
from disttrain.parallel.mesh import ShardMesh

Gradients = Sequence[torch.Tensor | None]


class Block:
    """Parameters whose gradients are dealt out together: those of a block, or of what is in none."""

    def __init__(self, model: nn.Module, sharded: Mapping[str, torch.Tensor], mesh: ShardMesh, dealer: Dealer) -> None:
        """`sharded` are the parameters that can be trained, by their names in the model; `mesh` is how they are.

        Blocks that share a `dealer` share its memory.
        """
        self.names = list(sharded)
        self._places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in sharded]
        self._mesh, self._dealer = mesh, dealer
        self.parts = [local(one.detach()) for one in sharded.values()]
        # Of each rank, of each parameter, which numbers it has: from the first up to the last, exclusive.
        self._bounds = [
            [_numbers_of(rank, one.shape, mesh.shard_size) for one in sharded.values()]
            for rank in range(mesh.shard_size)
        ]
        most = [end - start for start, end in self._bounds[0]]  # the first rank has no fewer than others
        self._runs = runs_of(most, self.parts[0].device) if self.parts else []
        self._totals: list[FixedPointSum] | None = None
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
        # The integers, twice the bytes of a part, are there from the first slice to the end of the last, not longer.
        self._integers = self._room_for(self._runs)
        self._totals = self._begun(self._runs, self._integers, largest, num_slices)

    def deal_out(self, gradients: Gradients) -> None:
        """Add a gradient, of one slice, of every worker of this replica: every rank must call it; None adds nothing."""
        assert self._totals is not None, "a sum must have begun"
        of_ranks, totals = self._by_rank(gradients), iter(self._totals)
        groups = together(self._runs, self._mesh.shard_size)
        for runs, received in self._dealt([(runs, of_ranks) for runs in groups]):
            self._add(runs, list(itertools.islice(totals, len(runs))), received)

    def sums(self) -> list[torch.Tensor]:
        """This worker's parts of the sums; what is not summed has any numbers. The sum is over then.

        Every rank must call it: the replicas' sums are added up, as integers.
        """
        assert self._totals is not None, "a sum must have begun"
        into = self._room_for_sums()
        self._finish(self._runs, self._totals, self._integers, into)
        del self._integers
        self._totals = None
        return into

    def sums_of(self, passes: Sequence[Gradients], largest: Mapping[str, float], num_slices: int) -> list[torch.Tensor]:
        """As `begin`, `deal_out` of each gradient and `sums`, run by run: the integers of a few are all there is.

        Every rank must call it, with as many gradients.
        """
        into, of_passes = self._room_for_sums(), [self._by_rank(gradients) for gradients in passes]
        groups = together(self._runs, self._mesh.shard_size)
        dealt = self._dealt([(runs, of_ranks) for runs in groups for of_ranks in of_passes])
        for runs in groups:
            integers = self._room_for(runs)
            totals = self._begun(runs, integers, largest, num_slices)
            for _, received in itertools.islice(dealt, len(passes)):
                self._add(runs, totals, received)
            self._finish(runs, totals, integers, into)
        return into

    def _room_for(self, runs: Sequence[Run]) -> torch.Tensor:
        size = sum(piece.numel() for run in runs for piece in cut(self.parts, run))
        return torch.empty(size, dtype=torch.int64, device=self.parts[0].device if self.parts else None)

    def _room_for_sums(self) -> list[torch.Tensor]:
        return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in self.parts]

    def _begun(
        self, runs: Sequence[Run], integers: torch.Tensor, largest: Mapping[str, float], num_slices: int
    ) -> list[FixedPointSum]:
        totals, begin = [], 0
        for run in runs:
            like = cut(self.parts, run)
            grids = [largest[self.names[segment.index]] for segment in run]
            end = begin + sum(map(torch.numel, like))
            totals.append(FixedPointSum(like, grids, num_slices, integers[begin:end]))
            begin = end
        return totals

    def _by_rank(self, gradients: Gradients) -> list[list[torch.Tensor]]:
        """By rank of this replica, the numbers of each gradient that are its own."""
        flat = [
            part.new_zeros(1).expand(self._bounds[-1][index][1]) if gradient is None else gradient.reshape(-1)
            for index, (part, gradient) in enumerate(zip(self.parts, gradients, strict=True))
        ]
        return [[one[start:end] for one, (start, end) in zip(flat, bounds, strict=True)] for bounds in self._bounds]

    def _dealt(
        self, messages: Sequence[tuple[Sequence[Run], Sequence[Sequence[torch.Tensor]]]]
    ) -> Iterator[tuple[Sequence[Run], torch.Tensor]]:
        """Deal out runs of gradients; give what all workers have of them for this one, while the next ones travel."""
        under_way: tuple[Sequence[Run], Callable[[], torch.Tensor]] | None = None
        for runs, of_ranks in messages:
            pieces = [[piece for run in runs for piece in cut(of_rank, run)] for of_rank in of_ranks]
            size = sum(piece.numel() for run in runs for piece in cut(self.parts, run))
            begun = runs, self._dealer.begin(pieces, size)
            if under_way is not None:
                yield under_way[0], under_way[1]()
            under_way = begun
        if under_way is not None:
            yield under_way[0], under_way[1]()

    def _add(self, runs: Sequence[Run], totals: Sequence[FixedPointSum], received: torch.Tensor) -> None:
        """Add what every worker of this replica has of some runs to their sums."""
        mine = [[piece.numel() for piece in cut(self.parts, run)] for run in runs]
        of_runs = torch.split(received, list(map(sum, mine)), dim=1)
        for total, sizes, of_run in zip(totals, mine, of_runs, strict=True):
            for of_rank in of_run:
                total.add(torch.split(of_rank, sizes))

    def _finish(
        self, runs: Sequence[Run], totals: Sequence[FixedPointSum], integers: torch.Tensor, into: Sequence[torch.Tensor]
    ) -> None:
        """Write the sums of some runs to the parts that are `into`; their `integers` lie one after the other."""
        for total in totals:
            total.integers()  # zeros, where nothing has been added
        if (replicas := self._mesh.replica_group) is not None and integers.numel():
            sum_(integers, replicas)
        for run, total in zip(runs, totals, strict=True):
            total.write(cut(into, run))


def _numbers_of(rank: int, shape: torch.Size, num_ranks: int) -> tuple[int, int]:
    """Which numbers of a parameter a rank has."""
    start, end = rows_of_all(shape[0], num_ranks)[rank]
    return start * shape[1:].numel(), end * shape[1:].numel()


def rows_of_all(num_rows: int, num_ranks: int) -> list[tuple[int, int]]:
    """Which rows of a parameter each rank has, from the first up to the last, exclusive: as `torch.chunk` cuts."""
    size = -(-num_rows // num_ranks)
    return [(min(rank * size, num_rows), min((rank + 1) * size, num_rows)) for rank in range(num_ranks)]


def as_gradient(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient as the gradient of a sharded parameter, which is cut alike."""
    assert isinstance(parameter, DTensor)
    # As FSDP2 does it. `DTensor.from_local` takes longer, for each parameter, than the sum of a small one.
    return DTensor(part, parameter._spec, requires_grad=False)
