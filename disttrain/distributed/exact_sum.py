"""Sums over all workers whose bits do not depend on how many there are: of lists of tensors, as integers.

They come in runs that stay in a core's cache: a run of each list is scaled, made integers and added up, and once it is
summed over the workers it is made numbers again. With one worker on CPUs, and in shared memory, where integers are
written to the place that the others read, there are never more of them than a few runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from disttrain.distributed import later
from disttrain.distributed.collectives import max_, sum_, wait_for
from disttrain.distributed.fixed_point import ABSENT, FixedPointSum, Summands, measured, surprises
from disttrain.distributed.foreach import real
from disttrain.distributed.runs import Run, cut, part, runs_of
from disttrain.distributed.shared_sums import SharedSums

# So many integers travel together where memory is not shared: some are on their way while others are made.
_MOST_TOGETHER = 1 << 19
# So many numbers, of several lists, are made integers at once where they are of several tensors.
_MOST_AT_ONCE = 1 << 18
# A piece of shared memory has room for the counters of so many tensors beside a run: for more they are summed before.
_MOST_COUNTED = (1 << 16) - 2


def exact_sum_(
    into: Sequence[torch.Tensor],
    summands: Sequence[Summands],
    num_summands: int,
    *,
    shared: SharedSums | None = None,
    expected: Sequence[float] | None = None,
    scratch: torch.Tensor | None = None,
    num_changes: int = 0,
) -> list[float]:
    """Replace each tensor of `into` by the sum of all that any rank passed for it; the order does not affect the bits.

    `summands` holds any number of lists of tensors of the shapes of `into`, with None for one that is not there; all
    ranks together pass `num_summands` lists at most. Returns a bound of each tensor's magnitudes over all ranks. What
    no rank passed (ABSENT), or what is not finite on any rank (infinite), is left as it is. A tensor of `into` may be
    one of the summands. The last `num_changes` of each list are changes: where one is zero, it counts as not there.
    They are summed in `shared` memory, if there is any; else `scratch` is memory for integers, used if it is enough.

    `expected` are bounds of the magnitudes that are expected, the same on all ranks. They take part in the bits. While
    they hold one all-reduce is enough, and one look at the device; otherwise the sum is made without them, after
    another one for the magnitudes.
    """
    found = measured(summands, num_changes)
    if expected is not None:
        counters = None
        if shared is None or len(expected) <= _MOST_COUNTED:
            counters = counted(found, expected, num_summands)
        is_worth_trying = counters is not None or are_as_expected(found, num_summands, expected)
        if is_worth_trying and SumInRuns(into, summands, expected, num_summands, counters).made(shared, scratch):
            return list(expected)
    largest = largest_of_all(found.view(-1, len(into)))
    SumInRuns(into, summands, largest, num_summands, None).made(shared, scratch)
    return largest


def are_as_expected(found: torch.Tensor, num_summands: int, expected: Sequence[float]) -> bool:
    """Whether `exact_sum_` would sum on the grids of the `expected` bounds; `found` is what `measured` gives."""
    return holds(sum_(counted(found, expected, num_summands)))


def largest_of_all(found: torch.Tensor) -> list[float]:
    """The largest magnitude of each tensor in all ranks' lists; `found` is what `measured` gives."""
    mine = found.cpu().amax(dim=0) if len(found) else torch.full(found.shape[1:], ABSENT, dtype=torch.float64)
    largest: list[float] = max_(mine).tolist()
    return largest


def counted(found: torch.Tensor, expected: Sequence[float], num_summands: int) -> torch.Tensor:
    """What, added up over all ranks, shows whether the expectation holds: the number of lists, and surprises, int64."""
    counters = torch.empty(len(expected) + 2, dtype=torch.int64, device=found.device)
    counters[:1].fill_(len(found))  # `counters[0] =` would send a number to a GPU, and wait for it
    counters[1:] = surprises(found, expected, num_summands)
    return counters


def holds(counters: torch.Tensor) -> bool:
    """Whether the expectation does, from what is `counted`, added up over all ranks."""
    num_lists, exceeding, *faint = counters.tolist()
    return not exceeding and num_lists not in faint


class SumInRuns:
    """A sum that is made run by run. Before the integers of the first one come `counters`, if there are any."""

    def __init__(
        self,
        into: Sequence[torch.Tensor],
        summands: Sequence[Summands],
        largest: Sequence[float],
        num_summands: int,
        counters: torch.Tensor | None,
    ) -> None:
        self._into = list(map(real, into))
        self._whole = [one.contiguous() for one in self._into]
        self._lists = [[None if one is None else real(one).contiguous() for one in each] for each in summands]
        self._largest, self._num_summands, self._counters = largest, num_summands, counters
        is_summed = [0 <= magnitude < math.inf for magnitude in largest]
        sizes = [one.numel() if summed else 0 for one, summed in zip(self._whole, is_summed, strict=True)]
        self._device = into[0].device if into else torch.device("cpu")
        self._runs: list[Run] = list(runs_of(sizes, self._device))
        if counters is not None and not self._runs:
            self._runs = [[]]
        self._of_run: list[FixedPointSum] = []
        self._is_used = True
        self._sizes = [sum(segment.end - segment.start for segment in run) for run in self._runs]
        if counters is not None:
            self._sizes[0] += counters.numel()

    def made(self, shared: SharedSums | None, scratch: torch.Tensor | None) -> bool:
        """Write the sums over all ranks and return True; or return False, if the counters forbid it."""
        sizes = self._sizes
        if shared is not None:
            for index, size in enumerate(sizes):
                shared.begin_with(size, torch.int64, partial(self._fill, index), partial(self._take, index))
            shared.finish()
        elif dist.get_world_size() == 1 and not later.is_asynchronous(self._device):
            place = torch.empty(max(sizes, default=0), dtype=torch.int64, device=self._device)
            for index, size in enumerate(sizes):
                self._fill(index, place[:size])
                self._take(index, place[:size])
        else:
            self._send(sizes, scratch)
        if self._is_used:
            self._copy_back()
        return self._is_used

    @property
    def size(self) -> int:
        """How many integers there are."""
        return sum(self._sizes)

    def fill(self, place: torch.Tensor) -> None:
        """Write all integers of this rank to `place`, in the order of the tensors: for whoever sends them otherwise."""
        for index, of_run in enumerate(torch.split(place, self._sizes)):
            self._fill(index, of_run)

    def take(self, sums: torch.Tensor) -> None:
        """Write the sums over all ranks, which are integers here, to the tensors."""
        for index, of_run in enumerate(torch.split(sums, self._sizes)):
            self._take(index, of_run)
        self._copy_back()

    def _copy_back(self) -> None:
        for into, whole in zip(self._into, self._whole, strict=True):
            if whole is not into:  # which is not contiguous
                into.copy_(whole)

    def _send(self, sizes: Sequence[int], scratch: torch.Tensor | None) -> None:
        """As `made`, by collectives. Some integers are on their way while the next ones are made.

        A GPU has them all to make by the time that somebody waits for the counters, with one worker, too.
        """
        if scratch is None or scratch.numel() < sum(sizes):
            scratch = torch.empty(sum(sizes), dtype=torch.int64, device=self._device)
        places = torch.split(scratch[: sum(sizes)], list(sizes))
        is_alone = dist.get_world_size() == 1
        works, begin, end = [], 0, 0
        for index, place in enumerate(places):
            self._fill(index, place)
            end += place.numel()
            if end - begin >= _MOST_TOGETHER or index == len(places) - 1:
                works.append((index, None if is_alone else dist.all_reduce(scratch[begin:end], async_op=True)))
                begin = end
        first = 0
        for last, work in works:
            if work is not None:
                wait_for(work)
            for index in range(first, last + 1):
                self._take(index, places[index])
            first = last + 1

    def _fill(self, index: int, place: torch.Tensor) -> None:
        """Write a run's integers, and the counters, where they are summed."""
        if index == 0 and self._counters is not None:
            head, place = self._parted(place)
            head.copy_(self._counters)
        run = self._runs[index]
        largest = [self._largest[segment.index] for segment in run]
        total = FixedPointSum(cut(self._whole, run), largest, self._num_summands, place)
        lists: list[Summands] = [
            [None if (one := each[segment.index]) is None else part(one, segment) for segment in run]
            for each in self._lists
        ]
        at_once = len(lists) if len(run) > 1 and len(lists) * len(place) <= _MOST_AT_ONCE else 1
        for first in range(0, len(lists), at_once or 1):
            total.add(*lists[first : first + at_once])
        total.integers()  # zeros, where nothing has been added
        self._of_run.append(total)

    def _take(self, index: int, sums: torch.Tensor) -> None:
        """Write the sums of a run, which are integers here, to the tensors. Runs come in their order."""
        if index == 0 and self._counters is not None:
            head, sums = self._parted(sums)
            self._is_used = holds(head)
        if self._is_used:
            self._of_run[index].write(cut(self._whole, self._runs[index]), sums)

    def _parted(self, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._counters is not None
        num = self._counters.numel()
        return place[:num], place[num:]
