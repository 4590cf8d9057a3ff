"""Exact mode: a step computed slice by slice, so that neither the number of workers nor any order affects its bits.

The global batch is cut into the same slices at every world size, and each worker computes a contiguous run of them, one
by one. Every slice starts from the step's weights and buffers. The slices' gradients are summed as integers, and so is
what each has changed in floating-point buffers (BatchNorm's statistics): the next step starts from their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from disttrain.distributed.collectives import broadcast_
from disttrain.distributed.exact_sum import exact_sum_
from disttrain.distributed.fixed_point import ABSENT, Summands, expected_magnitudes
from disttrain.distributed.foreach import copy_all_, real, settled
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.parallel.exact.changes import changes_of, places_of_buffers
from disttrain.parallel.exact.checksums import checksums
from disttrain.parallel.exact.sums import StepSums


class ExactSlices:
    """What a step's slices leave behind in a model: gathered slice by slice, then summed over all workers.

    In each step, a worker opens and closes those of its `slices` that have samples, one after the other; at the end all
    workers call `finish`.
    """

    def __init__(self, model: nn.Module, world: World, num_slices: int) -> None:
        """Every rank must call it: all start from rank 0's weights and buffers.

        Raises ConfigurationError if there are more workers than slices.
        """
        if world.size > num_slices:
            raise ConfigurationError(
                f"parallel.slices = {num_slices}: that many workers can share a step in exact mode, and {world.size} "
                f"were started. Start at most {num_slices}, or begin a new run with more slices."
            )
        if world.device.type == "mps":
            raise ConfigurationError(
                "parallel.exact = true: an Apple GPU serves one worker only; set train.device = 'cpu'."
            )
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.layout != torch.strided:
                raise ConfigurationError(
                    f"the model: '{name}' is sparse, which exact mode cannot send or sum: make it dense, or set "
                    "parallel.exact = false."
                )
        self.num_slices = num_slices
        self.slices = slices_of(world.rank, world.size, num_slices)
        self._world = world
        self._parameters = dict(model.named_parameters())
        # Looked up once: a walk through the modules costs more than what a step does with the buffers of a small model.
        self._places = places_of_buffers(model)
        self._start_from_rank_0()
        self._sums = self._new_sums()
        # A look at a buffer is cheaper than a difference; but a GPU would have to be waited for, for each of them.
        self._may_look = world.device.type == "cpu"
        # The bits that an expectation costs would be visible in float64.
        self._expects = all(real(parameter).dtype != torch.float64 for parameter in self._parameters.values())
        self._expected: Callable[[], list[float] | None] = lambda: None
        self.sums_are_finite = False
        """Whether the gradients of the step that was finished last are known to be finite without a look at them."""
        self.non_finite: tuple[str, ...] = ()
        """The parameters whose gradients, and the buffers whose changes, were not finite in the step that was finished
        last, on any worker: the same names on all."""
        self._not_summed: list[Summands] = []
        self._begin_step()

    def rejoin(self, world: World, expected: list[float] | None) -> None:
        """Forget an unfinished step, which began with `expected`, and serve the slices of another place."""
        self._world, self.slices, self.expected = world, slices_of(world.rank, world.size, self.num_slices), expected
        self.non_finite, self._not_summed = (), []
        self.abandon()
        self._sums = self._new_sums()  # the sum that broke may still hold the others' memory
        for parameter in self._parameters.values():
            parameter.grad = None
        self._begin_step()

    def _begin_step(self) -> None:
        self._versions_at_start: list[int] = []
        self._buffers_at_start: list[torch.Tensor] | None = None
        self._discrete_of_first: list[torch.Tensor] | None = None
        self._summands: list[Summands] = []
        self._closed: list[int] = []  # the slices that they are of

    def _start_from_rank_0(self) -> None:
        for tensor in (*self._parameters.values(), *self._buffers()):
            broadcast_(tensor.detach())

    def _new_sums(self) -> StepSums:
        return StepSums(list(self._parameters.values()), self._buffers(), self._world, self.num_slices)

    @property
    def expected(self) -> list[float] | None:
        """Bounds of the next step's gradients and buffers, from those of the step before: part of the run's state."""
        return self._expected()

    @expected.setter
    def expected(self, bounds: list[float] | None) -> None:
        self._expected = lambda: bounds

    @property
    def summed(self) -> list[str]:
        """The names of the tensors that a step sums, in the order of `expected`."""
        return [*self._parameters, *self._floating_buffers()]

    def _buffers(self) -> list[torch.Tensor]:
        return [getattr(module, name) for module, name in self._places.values()]

    @torch.no_grad()
    def open(self) -> None:
        """Give the model the buffers that the step started from."""
        if self._buffers_at_start is None:
            self._buffers_at_start = [buffer.clone() for buffer in self._buffers()]
            self._versions_at_start = [parameter._version for parameter in self._parameters.values()]
        else:
            self._restore_buffers()

    def begin_sum(self) -> None:
        """Let the step's sum begin within the backward pass that follows, of the last slice that is closed here.

        Nothing may be sent from there to `finish`.
        """
        self._sums.begin(self.expected, self._summands)

    def abandon(self) -> None:
        """Forget a sum that has begun."""
        self._sums.abandon()

    @torch.no_grad()
    def forget(self) -> None:
        """Forget an unfinished step, for another of the same slices."""
        self.abandon()
        self._restore_buffers()
        self._begin_step()

    @torch.no_grad()
    def close(self, slice_index: int) -> None:
        """Take the slice's gradients, and what it changed in the buffers, out of the model.

        Raises ConfigurationError if the model has written to a parameter of its own.
        """
        self._sums.close()
        self._summands.append(self._take(slice_index))
        self._closed.append(slice_index)

    def checksums(self, slice_index: int) -> list[int]:
        """Of what a slice that is closed here adds to the step, by `audited`."""
        return checksums(self._what_travels(slice_index, self._summands[self._closed.index(slice_index)]))

    @torch.no_grad()
    def checksums_apart(self, slice_index: int) -> list[int]:
        """As `close`, and then `checksums`, of a slice that another worker serves: it adds nothing to the step."""
        return checksums(self._what_travels(slice_index, self._take(slice_index)))

    @property
    def audited(self) -> list[str]:
        """The names of the tensors that a slice's checksums are of."""
        return [*self.summed, *(name for name in self._places if name not in self._floating_buffers())]

    def _what_travels(self, slice_index: int, summands: Summands) -> list[torch.Tensor | None]:
        discrete = self._discrete_of_first if slice_index == 0 else None
        return [*summands, *(discrete or [])]

    def _take(self, slice_index: int) -> list[torch.Tensor | None]:
        self._refuse_writing(self._parameters, self._versions_at_start)
        changes = self._take_changes(slice_index)
        gradients = [_taken(name, parameter) for name, parameter in self._parameters.items()]
        return [*gradients, *changes]

    @torch.no_grad()
    def finish(self, num_filled: int) -> None:
        """Give every worker's model the step's gradients and buffers. Every rank must call it.

        `num_filled` is how many of the slices had samples, over all workers. What is not finite on any worker is not
        summed: `non_finite` names it, such a gradient is infinite as a whole, such a buffer stays as it was.
        """
        self._restore_buffers()
        floating = self._floating_buffers()
        changes = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in floating.values()]
        sums, agreed = self._sums.finish(self.expected, self._summands, changes)
        self._expected = expected_magnitudes(sums, agreed) if self._expects else lambda: None
        largest = dict(zip((*self._parameters, *floating), agreed, strict=True))
        self.non_finite = tuple(name for name, magnitude in largest.items() if math.isinf(magnitude))
        self.sums_are_finite = self._are_finite(largest)
        for (name, parameter), gradient in zip(self._parameters.items(), sums, strict=False):
            if math.isinf(largest[name]):
                gradient = torch.full_like(gradient, math.inf)  # beside the slices' own, see sum_finite_parts
            parameter.grad = None if largest[name] == ABSENT else gradient
        self._change_buffers(floating, changes, largest, num_filled)
        self._not_summed = self._summands if self.non_finite else []
        self._begin_step()

    @torch.no_grad()
    def sum_finite_parts(self, scale: float) -> None:
        """Sum the gradients that `finish` left out, with a zero for each number of a slice that is not finite.

        `scale` is what the loss was multiplied by: the sums are divided by it.

        To be called after `finish`, before the next step. Every rank must call it.
        """
        bad = [index for index, name in enumerate(self._parameters) if name in self.non_finite]
        parameters = list(self._parameters.values())
        sums = [torch.zeros_like(parameters[index]) for index in bad]
        finite = [[zeroed(summands[index]) for index in bad] for summands in self._not_summed]
        if bad:
            exact_sum_(sums, finite, self.num_slices, shared=self._world.sums)
        for index, total in zip(bad, sums, strict=True):
            parameters[index].grad = total.div_(scale)
        self._not_summed = []

    def _are_finite(self, largest: Mapping[str, float]) -> bool:
        """Whether sums of gradients of these magnitudes must be finite."""
        return all(
            largest[name] == ABSENT or largest[name] * self.num_slices < torch.finfo(parameter.dtype).max
            for name, parameter in self._parameters.items()
        )

    @staticmethod
    def _refuse_writing(parameters: Mapping[str, torch.Tensor], versions: list[int]) -> None:
        now = [parameter._version for parameter in parameters.values()]
        if now != versions:
            written = zip(parameters, now, versions, strict=True)
            name = next(name for name, version, before in written if version != before)
            raise ConfigurationError(
                f"the model wrote to its parameter '{name}' in a forward or backward pass, where each worker sees "
                "other samples, so the workers' weights would diverge: make it a buffer, which all workers share, "
                "or set parallel.exact = false."
            )

    def _take_changes(self, slice_index: int) -> list[torch.Tensor | None]:
        """What the slice has added to each floating-point buffer; the other buffers are kept, if it is the first."""
        assert self._buffers_at_start is not None, "a slice must be opened first"
        if not self._places:
            return []
        buffers = self._buffers()
        if slice_index == 0:
            self._discrete_of_first = [buffer.clone() for buffer in buffers if not buffer.is_floating_point()]
        pairs = zip(self._buffers_at_start, buffers, strict=True)
        floating = [(before, after) for before, after in pairs if after.is_floating_point()]
        return changes_of(floating, may_look=self._may_look)

    def _floating_buffers(self) -> dict[str, torch.Tensor]:
        named = zip(self._places, self._buffers(), strict=True)
        return {name: buffer for name, buffer in named if buffer.is_floating_point()}

    def _change_buffers(
        self,
        floating: Mapping[str, torch.Tensor],
        changes: Sequence[torch.Tensor],
        largest: Mapping[str, float],
        num_filled: int,
    ) -> None:
        """Give the buffers, which are those of the step's start, the mean of what the slices have changed."""
        for (name, buffer), change in zip(floating.items(), changes, strict=True):
            if 0 < largest[name] < math.inf:
                buffer.copy_(buffer.double() + change / num_filled)
        self._share_discrete_buffers()

    def _restore_buffers(self) -> None:
        if self._buffers_at_start:
            copy_all_(self._buffers(), self._buffers_at_start)

    def _share_discrete_buffers(self) -> None:
        """Buffers that have no mean, such as counters, are those of the first slice, which rank 0 serves."""
        buffers = [buffer for buffer in self._buffers() if not buffer.is_floating_point()]
        if not buffers:
            return
        if self._discrete_of_first is not None:
            for buffer, first in zip(buffers, self._discrete_of_first, strict=True):
                buffer.copy_(first)
        if self._world.size > 1:
            everything = torch.cat([buffer.reshape(-1).view(torch.uint8) for buffer in buffers])
            sizes = [buffer.numel() * buffer.element_size() for buffer in buffers]
            for buffer, raw in zip(buffers, torch.split(broadcast_(everything), sizes), strict=True):
                buffer.copy_(raw.clone().view(buffer.dtype).view(buffer.shape))


def slices_of(rank: int, size: int, num_slices: int) -> range:
    """The run of slices that a worker serves: all together serve each once, none more than one more than another."""
    return range(rank * num_slices // size, (rank + 1) * num_slices // size)


def _taken(name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return None
    if gradient.layout != torch.strided:
        raise ConfigurationError(
            f"the model: the gradient of '{name}' is sparse, which exact mode cannot sum: use a dense one "
            "(sparse=False), or set parallel.exact = false."
        )
    return settled(gradient)


def zeroed(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient with a zero for each number that is not finite."""
    return None if gradient is None else gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
