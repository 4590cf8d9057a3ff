"""Sums that do not depend on the order: numbers as integers on a common grid, where addition is associative.

A tensor's grid is fixed by the largest magnitude among all its summands, which is a maximum and so does not depend on
the order either. The largest summand gets 62 bits, less one for each doubling of the number of summands; a sum can
therefore never overflow, however large or small the numbers are. Cutting off what lies below the grid is the only
error: less than 2**(h - 61) of the largest magnitude for each summand, where 2**h is the number of summands, rounded
up.

Where one sum follows another, its grid can be fixed by a bound that is expected of it, so that the ranks need not agree
on magnitudes first: `expected_magnitudes` makes bounds of the sums before, and `surprises` checks whether they hold.
The grid may then be coarser by h + 6 bits: less than 2**(2 * h - 55) of the largest magnitude is cut off each summand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from operator import gt

import numpy as np
import torch
from torch._utils import _unflatten_dense_tensors

from disttrain.distributed.foreach import in_a_row, real
from disttrain.distributed.later import from_host, to_host_later

ABSENT = -1.0
"""What stands for the magnitude of a tensor that is not there."""

_BITS = 62
# A summand may be so many bits larger or smaller than the sum before it for the expectation to hold.
_MARGIN = 3
# Powers of two beyond this leave float64's range of normal numbers: the smallest magnitudes are scaled in two steps.
_MOST_FLOAT64_SHIFT = 1022
# So many are worked on at once: few calls for a small model, and for a large one intermediate results of a few
# megabytes, which come from memory that is mapped already. Mapping a whole model's anew costs more than the arithmetic.
_ENOUGH_ELEMENTS = 1 << 20
# Scaling by 2**126 and back stays within float32's range of normal numbers.
_MOST_FLOAT32_SHIFT = 126
# Tensors of so few numbers are joined before they are looked at, and any tensors that have so few in all.
_LITTLE, _FEW = 1 << 14, 1 << 18

Summands = Sequence[torch.Tensor | None]


def magnitudes(summands: Summands) -> list[float]:
    """The largest magnitude in each tensor, as `measured` has it."""
    found: list[float] = measured([summands])[0].tolist()
    return found


def measured(lists: Sequence[Summands], num_changes: int = 0) -> torch.Tensor:
    """The largest magnitude in each tensor of each list, (lists, tensors) float64, on their device: no look at it.

    Infinite if a number is not finite, ABSENT for None and for a tensor without elements. The last `num_changes` of
    each list are changes: zeros are ABSENT, too.
    """
    flat = [None if one is None or not one.numel() else real(one) for summands in lists for one in summands]
    present = [tensor for tensor in flat if tensor is not None]
    if not present:
        found = torch.full((len(flat),), ABSENT, dtype=torch.float64)
    elif len(present) == len(flat):
        found = _largest_in_each(present)
    else:
        device = present[0].device
        places = torch.tensor([place for place, tensor in enumerate(flat) if tensor is not None])
        found = torch.full((len(flat),), ABSENT, dtype=torch.float64, device=device)
        found.index_copy_(0, from_host(places, device), _largest_in_each(present))
    found = found.view(len(lists), len(lists[0]) if lists else 0)
    if num_changes:
        changes = found[:, -num_changes:]
        changes.masked_fill_(changes == 0, ABSENT)
    return found


def _largest_in_each(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The largest magnitude in each tensor, (tensors,) float64; infinite for NaN."""
    find = _largest_by_numpy if _numpy_reaches(tensors[0].device) else _largest_by_norms
    return find(tensors).nan_to_num_(nan=math.inf, posinf=math.inf)


def _largest_by_numpy(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The same, NaN for NaN: of little tensors all at once, as a call of any operation takes longer than they do."""
    found = np.empty(len(tensors))
    sizes = [one.numel() for one in tensors]
    most = _FEW if sum(sizes) <= _FEW else _LITTLE
    joined = [at for at, one in enumerate(tensors) if sizes[at] <= most and one.dtype == torch.float32]
    if len(joined) > 1:
        row = in_a_row([tensors[at] for at in joined]).detach().abs_()
        found[joined] = np.maximum.reduceat(row.numpy(), [0, *accumulate(sizes[at] for at in joined[:-1])])
    for at in sorted({*range(len(tensors))}.difference(joined if len(joined) > 1 else ())):
        # One pass over the numbers, and twenty times as fast as the infinity norm.
        lowest, highest = torch.aminmax(tensors[at])
        found[at] = max(abs(lowest.item()), abs(highest.item()))
    return torch.from_numpy(found)


def _largest_by_norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The same in one kernel for each run of tensors of one type; NaN for NaN."""
    runs = [list(run) for _, run in groupby(tensors, lambda tensor: tensor.dtype)]
    return torch.cat([torch.stack(torch._foreach_norm(run, math.inf)).double() for run in runs])


def expected_magnitudes(sums: Sequence[torch.Tensor], largest: Sequence[float]) -> Callable[[], list[float] | None]:
    """Bounds that the summands of the next sums are expected to keep, from the sums just made; None: unknown.

    They are brought from the device while it goes on; a call of what is returned gives them, the same list each time.

    `largest` is what was known of the summands' magnitudes. A bound is some eight times the largest number of the sum,
    so 0 after zeros, and ABSENT for a tensor that was not there. After infinities nothing is expected: a tensor that
    was not finite has not been summed, so what is in it is this rank's own.
    """
    if math.inf in largest:
        return lambda: None
    known = [tensor if magnitude != ABSENT else None for tensor, magnitude in zip(sums, largest, strict=True)]
    numbers = to_host_later(measured([known])[0])
    return functools.cache(lambda: bounds_after(numbers().tolist()))  # a step that may be undone asks twice


def bounds_after(found: Sequence[float]) -> list[float] | None:
    """As `expected_magnitudes` has them, from the magnitudes of the sums."""
    if not all(magnitude == ABSENT or 0 <= magnitude < math.inf for magnitude in found):
        return None
    # A gradient that is always zero, as that of what is masked out or multiplied by zero, is expected to stay so.
    return [
        magnitude if magnitude in (0.0, ABSENT) else math.ldexp(1.0, math.frexp(magnitude)[1] + _MARGIN)
        for magnitude in found
    ]


def surprises(found: torch.Tensor, expected: Sequence[float], num_summands: int) -> torch.Tensor:
    """How many lists of tensors, whose magnitudes are `found` as `measured` has them, violate the `expected` bounds.

    (1 + tensors,) int64 on their device: first how many lists exceed a bound, then for each tensor in how many it is
    so small that the bound's grid is too coarse for it. To be added up over all ranks: the expectation holds if the
    first is 0, and none of the others is the number of lists.
    """
    faint = math.ldexp(1.0, -2 * _MARGIN - _headroom(num_summands))
    least = [-math.inf if bound == ABSENT else bound * faint for bound in expected]
    if _numpy_reaches(found.device):  # in plain Python, which takes less time than a call of any operation
        rows = found.tolist()
        exceeding = sum(any(map(gt, row, expected)) for row in rows)
        return torch.tensor([exceeding, *(sum(row[at] < bound for row in rows) for at, bound in enumerate(least))])
    limits = from_host(torch.tensor([expected, least], dtype=torch.float64), found.device)
    return torch.cat([(found > limits[0]).any(dim=1, keepdim=True), found < limits[1]], dim=1).sum(dim=0)


class FixedPointSum:
    """A sum of lists of tensors, as one flat vector of integers.

    Of each list the tensors at the places where `largest` is a finite magnitude are summed: that of the tensor over all
    the summands there are anywhere. `num_summands` is how many lists there are, or more. `scratch` is memory for the
    integers, used if it is large enough. A sum has `num_bits` and a sign.
    """

    def __init__(
        self,
        like: Sequence[torch.Tensor],
        largest: Sequence[float],
        num_summands: int,
        scratch: torch.Tensor | None = None,
        num_bits: int = _BITS,
    ) -> None:
        headroom = _headroom(num_summands)
        self._grids: list[_Grid] = []
        for index, (tensor, magnitude) in enumerate(zip(like, largest, strict=True)):
            if not 0 <= magnitude < math.inf:
                continue
            shift = num_bits - headroom - math.frexp(magnitude)[1]
            fits = tensor.dtype == torch.float32 and abs(shift) <= _MOST_FLOAT32_SHIFT
            size = real(tensor).numel()
            self._grid_for(torch.float32 if fits else torch.float64, size).append(index, size, shift)
        size = sum(grid.size for grid in self._grids)
        if scratch is None or scratch.numel() < size:
            scratch = torch.empty(size, dtype=torch.int64, device=like[0].device if like else None)
        self._total = scratch[:size]
        self._is_empty = True

    def add(self, *lists: Summands) -> None:
        """Add lists of tensors; None adds nothing. Several at once take fewer calls, but more memory."""
        for grid, place in self._places(self._total):
            for number, scaled in enumerate(grid.scaled(lists, place.device)):
                _add(place, scaled, is_first=self._is_empty and number == 0)
        self._is_empty = False

    def integers(self) -> torch.Tensor:
        """The sum so far, one int64 vector: others' are added to it in place."""
        if self._is_empty:
            self._total.zero_()
            self._is_empty = False
        return self._total

    def write(self, into: Sequence[torch.Tensor], integers: torch.Tensor | None = None) -> None:
        """Replace the tensors of `into` that are summed by their sum: this one, or that of these `integers`."""
        for grid, place in self._places(self._total if integers is None else integers):
            grid.write(place, into)

    def _grid_for(self, dtype: torch.dtype, size: int) -> _Grid:
        """The grid that takes the next tensor, of this type and size."""
        newest = next((grid for grid in reversed(self._grids) if grid.dtype == dtype), None)
        if newest is None or newest.size + size > _ENOUGH_ELEMENTS:
            newest = _Grid(dtype)
            self._grids.append(newest)
        return newest

    def _places(self, integers: torch.Tensor) -> list[tuple[_Grid, torch.Tensor]]:
        places = torch.split(integers, [grid.size for grid in self._grids])
        return list(zip(self._grids, places, strict=True))


class _Grid:
    """Some tensors that are scaled in one floating-point type, each by its own power of two, so without rounding.

    Each method does its work on all tensors in a few operations: for a small model, calls cost more than arithmetic.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.size = 0
        """Elements in all."""
        self._indices: list[int] = []
        self._sizes: list[int] = []
        self._shifts: list[int] = []

    def append(self, index: int, size: int, shift: int) -> None:
        """Take in the tensor at the place `index` of the lists."""
        self._indices.append(index)
        self._sizes.append(size)
        self._shifts.append(shift)
        self.size += size

    def scaled(self, lists: Sequence[Summands], device: torch.device) -> torch.Tensor:
        """The tensors of each list times their powers of two, one after another, (lists, size).

        What is left of the point is on the grid.
        """
        parts = []
        for summands in lists:
            for index, size in zip(self._indices, self._sizes, strict=True):
                tensor = summands[index]
                if tensor is None:
                    parts.append(torch.zeros(size, dtype=self.dtype, device=device))
                else:
                    part = real(tensor)
                    parts.append(part if part.dtype == self.dtype else part.to(self.dtype))
        return self._times_powers_of_two(in_a_row(parts).view(len(lists), self.size), self._shifts)

    def write(self, integers: torch.Tensor, into: Sequence[torch.Tensor]) -> None:
        """From integers back to numbers, each rounded once."""
        targets = [real(into[index]) for index in self._indices]
        numbers = self._times_powers_of_two(integers.to(self.dtype).view(1, -1), [-shift for shift in self._shifts])
        torch._foreach_copy_(targets, _unflatten_dense_tensors(numbers.view(-1), targets))  # type: ignore[no-untyped-call]

    def _times_powers_of_two(self, rows: torch.Tensor, shifts: list[int]) -> torch.Tensor:
        """Each tensor in each of the rows times two to the power of its shift, rounded once at most.

        Rows of several tensors are changed; of a single one they may be that tensor's own memory.
        """
        within = [max(-_MOST_FLOAT64_SHIFT, min(_MOST_FLOAT64_SHIFT, shift)) for shift in shifts]
        rest = [shift - done for shift, done in zip(shifts, within, strict=True)]
        for step in (within, rest) if any(rest) else (within,):
            factors = [math.ldexp(1.0, shift) for shift in step]
            if len(factors) == 1:
                rows = rows * factors[0]
            elif _numpy_reaches(
                rows.device
            ):  # a factor for each number: a third of the time of one call for each tensor
                rows.mul_(torch.from_numpy(np.repeat(torch.tensor(factors, dtype=self.dtype).numpy(), self._sizes)))
            else:
                torch._foreach_mul_(torch.split(rows.view(-1), self._sizes * len(rows)), factors * len(rows))
        return rows


def _add(integers: torch.Tensor, scaled: torch.Tensor, *, is_first: bool) -> None:
    """Add numbers to integers, which are nothing yet at the first; what is left of the point counts."""
    if not _numpy_reaches(integers.device):
        integers.copy_(scaled) if is_first else integers.add_(scaled.to(torch.int64))
        return
    # NumPy converts and adds in one pass, piece by piece in the cache, in less than half of torch's time.
    total, numbers = integers.numpy(), scaled.numpy()
    with np.errstate(invalid="ignore"):  # as in torch, what no integer can hold becomes any; such sums are not used
        if is_first:
            np.copyto(total, numbers, casting="unsafe")
        else:
            np.add(total, numbers, out=total, dtype=np.int64, casting="unsafe")


def _numpy_reaches(device: torch.device) -> bool:
    """Whether it has the memory that NumPy works in, and a look at a number waits for nothing."""
    return device.type == "cpu"


def _headroom(num_summands: int) -> int:
    """The bits that a sum of so many may need beyond those of the largest summand."""
    return max(0, (num_summands - 1).bit_length())
