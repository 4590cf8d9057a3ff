"""What a step's slices leave behind in a sharded model: gradients dealt out block by block, summed part by part.

A slice's gradients are whole on its worker for the length of a block's backward pass. Each worker then gets its part of
them, from every worker of its replica one slice's, and adds them to its integers; at the end of the step, those of the
replicas are added up. Their grids must be known before: they are those of
the bounds that the step before makes us expect. Where these do not hold, which shows when all slices are through, the
step is computed a second time, on the grids of the magnitudes that were found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from disttrain.distributed.collectives import are_as_expected, deal_out, largest_of_all, max_, sum_
from disttrain.distributed.fixed_point import ABSENT, FixedPointSum, bounds_after, magnitudes, measured
from disttrain.distributed.sharded import local
from disttrain.distributed.world import World
from disttrain.parallel.exact.slices import ExactSlices, zeroed
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
        for parameter, gradient, rows in zip(self.whole, gradients, self._rows, strict=True):
            whole = torch.zeros_like(parameter) if gradient is None else gradient
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


class ShardedSlices(ExactSlices):
    """As `ExactSlices`, of a model whose parameters are sharded after this has been made; then `attach` is called."""

    def __init__(self, model: nn.Module, world: World, num_slices: int) -> None:
        super().__init__(model, world, num_slices)
        self._model = model
        self._blocks: list[Block] = []

    def _start_from_rank_0(self) -> None:
        self._parameters = {}  # as they are cut; and to hold none of them whole

    def _num_integers(self) -> int:
        return 0  # each block has its own

    def attach(self, modules: Mapping[str, nn.Module], mesh: ShardMesh) -> list[Block]:
        """Follow the parameters, which are sharded now; `modules` are the blocks, by name. The last is of the rest."""
        self._parameters = dict(self._model.named_parameters())
        rest = {name: one for name, one in self._parameters.items() if one.requires_grad}
        for path in modules:
            inside = {name: one for name, one in rest.items() if name.startswith(f"{path}.")}
            rest = {name: one for name, one in rest.items() if name not in inside}
            self._blocks.append(Block(self._model, inside, mesh))
        self._blocks.append(Block(self._model, rest, mesh))
        return self._blocks

    def _begin_step(self) -> None:
        super()._begin_step()
        self._grids: dict[str, float] | None = None  # the magnitudes that the sums' grids are made of; None: unknown
        self._agreed: dict[str, float] = {}
        self._found_before: list[list[float]] | None = None
        self._begin_pass_of_all()

    def _begin_pass_of_all(self) -> None:
        self._summands = []  # the changes of buffers
        self._discrete_of_first = None
        self._found: list[list[float]] = []
        self._found_finite: list[list[float]] = []
        self._begin_slice()

    def _begin_slice(self) -> None:
        self._of_slice: dict[str, float] = {}
        self._finite_of_slice: dict[str, float] = {}

    def open(self) -> None:
        """As `ExactSlices` has it."""
        super().open()
        for block in self._blocks:
            block.versions = []  # those of the slice's first call

    def begin_dealing(self) -> None:
        """To be called before a micro-batch after which the gradients are dealt out."""
        for block in self._blocks:
            block.num_calls = block.num_left = 0
            block.is_waiting = bool(block.names)
        if self._grids is None and self.expected is not None:
            self._sum_on(dict(zip(self.summed, self.expected, strict=True)))

    def _sum_on(self, grids: dict[str, float]) -> None:
        self._grids = grids
        for block in self._blocks:
            block.begin(grids, self.num_slices)

    @torch.no_grad()
    def take(self, block: Block, *, counts: bool) -> None:
        """Deal out the gradients of a block, or without `counts` none; they are measured only if no grid is known.

        Every rank must call it for the same blocks in the same order.
        """
        block.is_waiting = False
        gradients = block.take()
        if not counts:
            gradients = [None] * len(gradients)
        for index, (name, magnitude) in enumerate(zip(block.names, magnitudes(gradients), strict=True)):
            self._of_slice[name] = magnitude
            if math.isinf(magnitude):
                finite = zeroed(gradients[index])
                self._finite_of_slice[name] = magnitudes([finite])[0]
                if math.isinf(self._agreed.get(name, ABSENT)):
                    gradients[index] = finite
        if self._grids is not None:
            block.deal_out(gradients)

    def take_rest(self, *, counts: bool) -> None:
        """As `take`, for the blocks that were called since `begin_dealing` and still wait."""
        for block in self._blocks:
            if block.is_waiting and block.num_calls:
                self.take(block, counts=counts)

    @torch.no_grad()
    def close(self, slice_index: int) -> None:
        """As `ExactSlices` has it; the gradients have been taken."""
        self.refuse_writing()
        changes = self._take_changes(slice_index)
        self._summands.append(changes)
        of_changes = measured([changes], len(changes))[0].tolist()
        self._found.append([*(self._of_slice.get(name, ABSENT) for name in self._parameters), *of_changes])
        finite = {**self._of_slice, **self._finite_of_slice}
        self._found_finite.append([finite.get(name, ABSENT) for name in self._parameters])
        self._begin_slice()

    def needs_second_pass(self) -> bool:
        """Whether the grids were unknown or not right for the gradients found. Every rank must call it, once a step."""
        if self._grids is not None:
            assert self.expected is not None
            if are_as_expected(_table(self._found, len(self.expected)), self.num_slices, self.expected):
                self._agreed = self._grids
                return False
        summed = self.summed
        self._agreed = dict(zip(summed, largest_of_all(_table(self._found, len(summed))), strict=True))
        grids = dict(self._agreed)
        if math.inf in grids.values():
            finite = largest_of_all(_table(self._found_finite, len(self._parameters)))
            grids.update(zip(self._parameters, finite, strict=True))
        self._found_before = self._found
        self._begin_pass_of_all()
        self._sum_on(grids)
        return True

    def refuse_writing(self) -> None:
        """Raise ConfigurationError if the model has written to parameters while they were gathered."""
        for block in self._blocks:
            if block.versions:
                self._refuse_writing(dict(zip(block.names, block.whole, strict=True)), block.versions)

    def passes_disagree(self) -> bool:
        """Whether a slice had gradients of other magnitudes in the second pass. Every rank must call it."""
        if self._found_before is None:  # the same on all ranks
            return False
        return bool(max_(torch.tensor(float(self._found_before != self._found))))

    @torch.no_grad()
    def drop(self) -> None:
        """Forget the gradients that have arrived."""
        for block in self._blocks:
            block.take()

    @torch.no_grad()
    def mark_gradients(self) -> None:
        """Give the sharded parameters whose gradients have arrived some of zeros instead."""
        for block in self._blocks:
            for name, gradient in zip(block.names, block.take(), strict=False):
                self._parameters[name].grad = None if gradient is None else torch.zeros_like(self._parameters[name])

    @torch.no_grad()
    def finish(self, num_filled: int) -> None:
        """As `ExactSlices` has it, for each worker's parts of the gradients."""
        self._restore_buffers()
        floating, largest = self._floating_buffers(), self._agreed
        changes = self._sums_of_changes(floating)
        self.non_finite = tuple(name for name, magnitude in largest.items() if math.isinf(magnitude))
        self.sums_are_finite = self._are_finite(largest)
        self._finite_parts: dict[str, torch.Tensor] = {}
        sums: dict[str, torch.Tensor] = {}
        for block in self._blocks:
            sums.update(zip(block.names, block.sums(), strict=True))
        for name, parameter in self._parameters.items():
            if largest[name] == ABSENT:
                sums.pop(name, None)
                parameter.grad = None
                continue
            if math.isinf(largest[name]):
                self._finite_parts[name] = sums[name]
                sums[name] = torch.full_like(sums[name], math.inf)
            parameter.grad = as_gradient(sums[name], parameter)
        present = [change if largest[name] != ABSENT else None for name, change in zip(floating, changes, strict=True)]
        self.expected = None
        if self._expects and not self.non_finite:
            found = magnitudes([*map(sums.get, self._parameters), *present])
            self.expected = bounds_after(largest_of_all(_table([found], len(found))))
        self._change_buffers(floating, changes, largest, num_filled)
        self._begin_step()

    def _sums_of_changes(self, floating: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        changes = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in floating.values()]
        total = FixedPointSum(changes, [self._agreed[name] for name in floating], self.num_slices)
        for summand in self._summands:
            total.add(summand)
        if total.integers().numel():
            sum_(total.integers())
        total.write(changes)
        return changes

    @torch.no_grad()
    def sum_finite_parts(self, scale: float) -> None:
        """As `ExactSlices` has it."""
        for name, part in self._finite_parts.items():
            self._parameters[name].grad = as_gradient(part.div_(scale), self._parameters[name])
        self._finite_parts = {}


def _table(found: Sequence[Sequence[float]], num_tensors: int) -> torch.Tensor:
    return torch.tensor(found, dtype=torch.float64).view(-1, num_tensors)


def rows_of_all(num_rows: int, num_ranks: int) -> list[tuple[int, int]]:
    """Which rows of a parameter each rank has, from the first up to the last, exclusive: as `torch.chunk` cuts."""
    size = -(-num_rows // num_ranks)
    return [(min(rank * size, num_rows), min((rank + 1) * size, num_rows)) for rank in range(num_ranks)]


def as_gradient(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient as the gradient of a sharded parameter."""
    assert isinstance(parameter, DTensor)
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
