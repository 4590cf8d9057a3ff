"""A step's sum by collectives, which begins within the backward pass of a worker's last slice.

The grids follow from the sum of the step before, so a gradient's integers can be made, and sent, as soon as it is
there. Gradients travel in pieces, in the reverse order of the parameters, which is roughly that of a backward pass.
Every rank sends the same pieces in the same order, some of them within its backward pass and the others after it. What
shows whether the expectation holds comes last, with the buffers' changes; only then are sums written to the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from disttrain.distributed.collectives import wait_for
from disttrain.distributed.exact_sum import SumInRuns, counted, holds
from disttrain.distributed.fixed_point import ABSENT, Summands, measured
from disttrain.distributed.foreach import copy_all_, differ, real, settled

# So many integers travel together: some megabytes, as DDP's buckets. GPUs take longer to begin one.
_MOST_TOGETHER = {"cpu": 1 << 19}
_MOST_TOGETHER_ELSEWHERE = 1 << 21


def integers_of(tensors: Sequence[torch.Tensor]) -> int:
    """How many integers the sum of these parameters and buffers needs at most."""
    return sum(real(tensor).numel() + 1 for tensor in tensors) + 3  # a counter for each, and three more


class SumAhead:
    """The sum of one step. Every rank must `finish` it; those that have slices may `begin` it before."""

    def __init__(
        self, parameters: Sequence[torch.Tensor], expected: Sequence[float], num_summands: int, scratch: torch.Tensor
    ) -> None:
        """`expected` are bounds of all gradients and then of the buffers' changes, see `exact_sum_`.

        `scratch` has room for `integers_of` them.
        """
        self._parameters, self._expected, self._num_summands = parameters, expected, num_summands
        self._lists: Sequence[Summands] = ()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._gradients: dict[int, torch.Tensor] = {}  # what the sums are written to
        self._num_sent = 0
        self.was_changed = False
        """Once it is finished: whether a gradient was changed on any rank after it had been sent."""
        self._pieces, self._rest = self._cut(scratch)
        self._piece_of = {index: piece for piece in self._pieces for index in piece.indices}

    def _cut(self, scratch: torch.Tensor) -> tuple[list[_Piece], torch.Tensor]:
        """The pieces, and what is left of `scratch`."""
        most = _MOST_TOGETHER.get(scratch.device.type, _MOST_TOGETHER_ELSEWHERE)
        indices: list[list[int]] = []
        sizes: list[int] = []
        for index in reversed(range(len(self._parameters))):
            size = real(self._parameters[index]).numel()
            if self._expected[index] == ABSENT or not size:
                continue
            if not sizes or sizes[-1] + size > most:
                indices.append([])
                sizes.append(0)
            indices[-1].append(index)
            sizes[-1] += size
        *places, rest = torch.split(scratch, [*sizes, scratch.numel() - sum(sizes)])
        return [
            _Piece(of_piece, {index for index in of_piece if self._parameters[index].requires_grad}, place)
            for of_piece, place in zip(indices, places, strict=True)
        ], rest

    def begin(self, closed: Sequence[Summands]) -> None:
        """Send gradients as they come in the backward pass that follows, of this worker's slice after those `closed`.

        Nothing else may be sent until `finish`.
        """
        self._lists = closed
        for piece in self._pieces[:-1]:
            for index in piece.awaited:
                # Anew in each step: so it comes after the hooks of others, which may change a gradient.
                register: Any = self._parameters[index].register_post_accumulate_grad_hook
                self._hooks.append(register(partial(self._has_come, index)))

    @property
    def num_sent(self) -> int:
        """How many pieces have been sent."""
        return self._num_sent

    def _has_come(self, index: int, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            return  # which is refused when the slice is closed
        self._piece_of[index].awaited.discard(index)
        # The last piece awaits what a backward pass ends with: sent within it, it would gain nothing.
        while self._num_sent < len(self._pieces) - 1 and not self._pieces[self._num_sent].awaited:
            self._send_copies(self._pieces[self._num_sent])

    @torch.no_grad()
    def _send_copies(self, piece: _Piece) -> None:
        """Send a piece whose gradients of the last slice may still be changed: what they were is kept."""
        earlier = [[each[index] for index in piece.indices] for each in self._lists]
        gradients = (self._parameters[index].grad for index in piece.indices)
        last = [None if gradient is None else settled(gradient) for gradient in gradients]
        piece.sent = _copies(last)
        self._send(piece, [*earlier, piece.sent], [*earlier, last])

    @torch.no_grad()
    def _send(self, piece: _Piece, lists: Sequence[Summands], rooms: Sequence[Summands]) -> None:
        into = [
            room_for(self._parameters[index], (each[at] for each in rooms)) for at, index in enumerate(piece.indices)
        ]
        piece.sum = SumInRuns(into, lists, [self._expected[index] for index in piece.indices], self._num_summands, None)
        piece.sum.fill(piece.place)
        piece.work = dist.all_reduce(piece.place, async_op=True)
        self._gradients.update(zip(piece.indices, into, strict=True))
        self._num_sent += 1

    def close(self) -> None:
        """Send no more until `finish`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def finish(self, summands: Sequence[Summands], changes: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """The sums of the gradients, of those that are expected; sums of changes are written to `changes`.

        `summands` are those of all slices of this worker. None, on all ranks, if the sum has to be made in another way:
        with the same bounds if it `was_changed`, otherwise without.
        """
        num = len(self._parameters)
        for piece in self._pieces[self._num_sent :]:
            lists = [[each[index] for index in piece.indices] for each in summands]
            self._send(piece, lists, lists)
        found = measured(summands, len(changes))
        changed = [each[num:] for each in summands]
        of_changes = SumInRuns(changes, changed, self._expected[num:], self._num_summands, None)
        num_counters = len(self._expected) + 3
        rest = self._rest[: num_counters + of_changes.size]
        rest[:1].fill_(sum(self._differences(summands)))  # a number by a kernel, as in `counted`
        rest[1:num_counters] = counted(found, self._expected, self._num_summands)
        of_changes.fill(rest[num_counters:])
        work = dist.all_reduce(rest, async_op=True)
        for piece in self._pieces:
            if piece.work is not None:
                wait_for(piece.work)
        if work is not None:
            wait_for(work)
        counters = rest[:num_counters].cpu()
        self.was_changed = bool(counters[0])
        if self.was_changed or not holds(counters[1:]):
            return None
        of_changes.take(rest[num_counters:])
        for piece in self._pieces:
            assert piece.sum is not None
            piece.sum.take(piece.place)
        return [self._gradients.get(index, parameter) for index, parameter in enumerate(self._parameters)]

    def _differences(self, summands: Sequence[Summands]) -> Iterator[torch.Tensor | bool]:
        """Of each piece that was sent within a backward pass, whether that has left other gradients in the end."""
        for piece in self._pieces:
            if piece.sent is not None:
                yield differ(piece.sent, [summands[-1][index] for index in piece.indices])


@dataclass
class _Piece:
    indices: list[int]
    """Of the parameters whose gradients it is made of."""
    awaited: set[int]
    """Those of them that the backward pass may still give one."""
    place: torch.Tensor
    sum: SumInRuns | None = None
    work: dist.Work | None = None
    sent: Summands | None = None
    """Of the last slice, if it was sent within that one's backward pass."""


def room_for(parameter: torch.Tensor, summands: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Memory for the sum of a parameter's gradients: that of a slice's, whose numbers are in the sum before.

    Not that of an expanded view, whose elements are one in memory: a hook may have put it in the gradient's place.
    """
    found = next((gradient for gradient in summands if gradient is not None and 0 not in gradient.stride()), None)
    return torch.empty_like(parameter) if found is None else found


def _copies(gradients: Summands) -> list[torch.Tensor | None]:
    copies = [
        None if one is None else torch.empty_like(one, memory_format=torch.contiguous_format) for one in gradients
    ]
    copy_all_([one for one in copies if one is not None], [one for one in gradients if one is not None])
    return copies
