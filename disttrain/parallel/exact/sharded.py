"""What a step's slices leave behind in a sharded model: gradients dealt out block by block, summed part by part.

A slice's gradients are whole on its worker for the length of a block's backward pass. Each worker then gets its part of
them, from every worker of its replica one slice's, and adds them to its integers; at the end of the step, those of the
replicas are added up. Their grids must be known before: they are those of
the bounds that the step before makes us expect. Where these do not hold, which shows when all slices are through, the
step is computed a second time, on the grids of the magnitudes that were found.

Of a small model, a worker keeps its slices' gradients whole until the step's end: they are dealt out then, all at once,
on the right grids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from disttrain.distributed.collectives import max_, sum_
from disttrain.distributed.exact_sum import are_as_expected, largest_of_all
from disttrain.distributed.fixed_point import ABSENT, FixedPointSum, bounds_after, magnitudes, measured
from disttrain.distributed.world import World
from disttrain.parallel.exact.block import Block, Gradients, as_gradient
from disttrain.parallel.exact.dealing import Dealer
from disttrain.parallel.exact.slices import ExactSlices, slices_of, zeroed
from disttrain.parallel.mesh import ShardMesh

# What the gradients of a worker's slices may take of its memory until the step's end.
_MOST_HELD_BYTES = 64 << 20


class ShardedSlices(ExactSlices):
    """As `ExactSlices`, of a model whose parameters are sharded after this has been made; then `attach` is called."""

    def __init__(self, model: nn.Module, world: World, num_slices: int) -> None:
        super().__init__(model, world, num_slices)
        self._model = model
        self._blocks: list[Block] = []
        self._num_passes = max(len(slices_of(rank, world.size, num_slices)) for rank in range(world.size))
        self.holds_gradients = False
        """Whether a worker keeps the gradients of all its slices until the step's end."""

    def _start_from_rank_0(self) -> None:
        self._parameters = {}  # as they are cut; and to hold none of them whole

    def _room_for_integers(self) -> None:
        """None: each block has its own."""

    def attach(self, modules: Mapping[str, nn.Module], mesh: ShardMesh, affordable_bytes: int) -> list[Block]:
        """Follow the parameters, which are sharded now; `modules` are the blocks, by name. The last is of the rest.

        The whole weights, which stay gathered meanwhile, and the gradients of a worker's slices may take
        `affordable_bytes` together.
        """
        self._parameters = dict(self._model.named_parameters())
        dealer = Dealer(mesh.shard_group)
        rest = {name: one for name, one in self._parameters.items() if one.requires_grad}
        for path in modules:
            inside = {name: one for name, one in rest.items() if name.startswith(f"{path}.")}
            rest = {name: one for name, one in rest.items() if name not in inside}
            self._blocks.append(Block(self._model, inside, mesh, dealer))
        self._blocks.append(Block(self._model, rest, mesh, dealer))
        trained = {name: one for name, one in self._parameters.items() if one.requires_grad}
        size = sum(one.numel() * one.element_size() for one in trained.values())  # whole: the same on all ranks
        weights = sum(one.numel() * one.element_size() for one in self._parameters.values())
        self.holds_gradients = self._num_passes * size <= max(_MOST_HELD_BYTES, affordable_bytes - weights)
        self._all_of_it = Block(self._model, trained, mesh, dealer) if self.holds_gradients else None
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
        self._held: list[dict[str, torch.Tensor | None]] = []
        self._begin_slice()

    def _begin_slice(self) -> None:
        self._held_of_slice: dict[str, torch.Tensor | None] = {}
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
        if not self.holds_gradients:
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
        self._measure(dict(zip(block.names, gradients, strict=True)))
        if self._grids is not None:
            block.deal_out(self._finite_where_needed(dict(zip(block.names, gradients, strict=True))))

    def take_rest(self, *, counts: bool) -> None:
        """As `take`, for the blocks that were called since `begin_dealing` and still wait."""
        for block in self._blocks:
            if self.holds_gradients:
                # No block that was not called in this run has had any.
                arrived = zip(block.names, block.take(), strict=bool(block.whole))
                self._held_of_slice.update(arrived if counts else ())
            elif block.is_waiting and block.num_calls:
                self.take(block, counts=counts)

    def _measure(self, gradients: Mapping[str, torch.Tensor | None]) -> None:
        """Note the magnitudes of a slice's gradients."""
        found = dict(zip(gradients, magnitudes(list(gradients.values())), strict=True))
        self._of_slice.update(found)
        for name, magnitude in found.items():
            if math.isinf(magnitude):
                self._finite_of_slice[name] = magnitudes([zeroed(gradients[name])])[0]

    def _finite_where_needed(self, gradients: Mapping[str, torch.Tensor | None]) -> Gradients:
        """The gradients, with zeros in place of what is not finite where those of any slice are known not to be."""
        return [
            zeroed(gradient) if math.isinf(self._agreed.get(name, ABSENT)) else gradient
            for name, gradient in gradients.items()
        ]

    @torch.no_grad()
    def close(self, slice_index: int) -> None:
        """As `ExactSlices` has it; the gradients have been taken."""
        self.refuse_writing()
        if self.holds_gradients:
            self._measure(self._held_of_slice)
            self._held.append(self._held_of_slice)
        changes = self._take_changes(slice_index)
        self._summands.append(changes)
        of_changes = measured([changes], len(changes))[0].tolist()
        self._found.append([*(self._of_slice.get(name, ABSENT) for name in self._parameters), *of_changes])
        finite = {**self._of_slice, **self._finite_of_slice}
        self._found_finite.append([finite.get(name, ABSENT) for name in self._parameters])
        self._begin_slice()

    @torch.no_grad()
    def needs_second_pass(self) -> bool:
        """Whether the grids were unknown or not right for the gradients found, and these are gone.

        Every rank must call it, once a step.
        """
        grids = self._grids_of_all()
        if self.holds_gradients:
            self._grids = grids
            return False
        if grids is self._grids:
            return False
        self._found_before = self._found
        self._begin_pass_of_all()
        self._sum_on(grids)
        return True

    def _grids_of_all(self) -> dict[str, float]:
        """The magnitudes to sum by: those expected, or where they do not hold, those found. Every rank must call it."""
        expected, summed = self.expected, self.summed
        might_hold = expected is not None and (self.holds_gradients or self._grids is not None)
        if might_hold and are_as_expected(_table(self._found, len(summed)), self.num_slices, expected or []):
            self._agreed = self._grids or dict(zip(summed, expected or [], strict=True))
            return self._agreed
        self._agreed = dict(zip(summed, largest_of_all(_table(self._found, len(summed))), strict=True))
        grids = dict(self._agreed)
        if math.inf in grids.values():
            finite = largest_of_all(_table(self._found_finite, len(self._parameters)))
            grids.update(zip(self._parameters, finite, strict=True))
        return grids

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

    def abandon(self) -> None:
        """Forget an unfinished step and the gradients kept of it; the buffers are those that it started from."""
        self.drop()
        if self._buffers_at_start is not None:
            self._restore_buffers()
        self._begin_step()

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
        sums = self._sums_of_gradients()
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

    def _sums_of_gradients(self) -> dict[str, torch.Tensor]:
        if (whole := self._all_of_it) is None:
            return {name: part for block in self._blocks for name, part in zip(block.names, block.sums(), strict=True)}
        assert self._grids is not None, "needs_second_pass comes before"
        passes = [
            self._finite_where_needed({name: held.get(name) for name in whole.names})
            for held in [*self._held, *({} for _ in range(self._num_passes - len(self._held)))]
        ]
        self._held = []
        return dict(zip(whole.names, whole.sums_of(passes, self._grids, self.num_slices), strict=True))

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
