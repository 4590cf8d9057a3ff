"""The outer step of local training (DiLoCo, arXiv 2311.08105): workers that have trained apart meet.

The mean of what all have changed since they last met is a gradient for an outer optimizer, SGD with Nesterov momentum,
which moves the weights that all start from again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from disttrain.distributed.collectives import max_, sum_
from disttrain.distributed.fixed_point import ABSENT, FixedPointSum, magnitudes
from disttrain.distributed.int8 import int8_mean_

# What 32 and 64 bits hold beside a sign, but one: a sum may come to exactly that power of two.
_BITS = {torch.int32: 30, torch.int64: 62}
_WIDE = (torch.float64, torch.complex128)
# So many numbers are summed at once: a whole model's integers would take three times the memory of its weights.
AT_ONCE = 1 << 22
# Scaling by so many powers of two stays within float32's range.
_MOST_SHIFT = 120


@dataclass(frozen=True)
class MeanChanges:
    """The mean of all workers' changes by name, the same on every rank; what no worker has changed is not there.

    `not_finite` are the names of those that are not finite on some worker, which have no mean.
    """

    by_name: dict[str, torch.Tensor]
    not_finite: tuple[str, ...]


def mean_changes(
    changes: Mapping[str, torch.Tensor | None],
    like: Mapping[str, torch.Tensor],
    num_workers: int,
    sent_as: torch.dtype | None = None,
    buffers: Collection[str] = (),
) -> MeanChanges:
    """The mean of the changes of all workers, each of the form that `like` has by the same name; None: no change.

    Each number travels as an integer of 32 bits (64 for a float64) on a grid that all workers share, so the order of
    the workers does not affect the mean; what is cut off is less than 2**-29 of the tensor's largest number, times the
    number of workers. With `sent_as`, a float type of 16 bits, it travels as such a float, and sums round; with int8
    as `int8_mean_` has it, but for the names in `buffers`. Every rank must call it.
    """
    agreed: list[float] = max_(torch.tensor(magnitudes(list(changes.values())), dtype=torch.float64)).tolist()
    largest = dict(zip(changes, agreed, strict=True))
    present = [name for name, magnitude in largest.items() if ABSENT < magnitude < math.inf]
    by_name = {name: torch.zeros_like(like[name]) if changes[name] is None else changes[name] for name in present}
    mean: dict[str, torch.Tensor] = {name: change for name, change in by_name.items() if change is not None}
    # In int8 a small number beside a large one is off by as much as it is: a variance could become negative.
    in_full = {name for name in mean if sent_as is None or (sent_as is torch.int8 and name in buffers)}
    for full in (True, False) if num_workers > 1 else ():
        for names in _at_once({name: change for name, change in mean.items() if (name in in_full) is full}):
            some, bounds = [mean[name] for name in names], [largest[name] for name in names]
            if sent_as is None or full:
                _sum_integers_(some, bounds, num_workers)
                torch._foreach_div_(some, float(num_workers))
            elif sent_as is torch.int8:
                int8_mean_(some, num_workers)
            else:
                _mean_of_floats_(some, bounds, num_workers, sent_as)
    return MeanChanges(mean, tuple(name for name, magnitude in largest.items() if magnitude == math.inf))


def _at_once(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """The names in lists of a few million numbers each, of tensors that are all wide or all not."""
    for is_wide in (False, True):
        names: list[str] = []
        size = 0
        for name, tensor in tensors.items():
            if (tensor.dtype in _WIDE) is not is_wide:
                continue
            if names and size + tensor.numel() > AT_ONCE:
                yield names
                names, size = [], 0
            names.append(name)
            size += tensor.numel()
        if names:
            yield names


def _sum_integers_(tensors: list[torch.Tensor], largest: list[float], num_workers: int) -> None:
    sent_as = torch.int64 if tensors[0].dtype in _WIDE else torch.int32
    total = FixedPointSum(tensors, largest, num_workers, num_bits=_BITS[sent_as])
    total.add(tensors)
    integers = total.integers()
    integers.copy_(sum_(integers.to(sent_as)))
    total.write(tensors)


def _mean_of_floats_(tensors: list[torch.Tensor], largest: list[float], num_workers: int, dtype: torch.dtype) -> None:
    """Scaled to one at most, so that a float16 neither overflows nor loses small numbers."""
    shifts = [max(-_MOST_SHIFT, min(_MOST_SHIFT, math.frexp(magnitude)[1])) for magnitude in largest]
    reals = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    scaled = [
        (real * (math.ldexp(1.0, -shift) / num_workers)).reshape(-1) for real, shift in zip(reals, shifts, strict=True)
    ]
    total = sum_(torch.cat([one.to(dtype) for one in scaled]))
    for real, part, shift in zip(reals, torch.split(total, [one.numel() for one in scaled]), shifts, strict=True):
        real.copy_(part.view(real.shape)).mul_(math.ldexp(1.0, shift))


class OuterOptimizer:
    """Stochastic gradient descent with Nesterov momentum, as torch's SGD has it, on changes in place of gradients."""

    def __init__(self, lr: float, momentum: float) -> None:
        self._lr, self._factor = lr, momentum
        self.momentum: dict[str, torch.Tensor] = {}
        """What each parameter, by name, keeps of the steps before: the same on every rank."""

    def step_(self, name: str, start: torch.Tensor, change: torch.Tensor) -> None:
        """Move the weights `start`, from which the workers set out, along the mean of their changes."""
        if self._factor:
            if name in self.momentum:
                momentum = self.momentum[name].mul_(self._factor).add_(change)
            else:
                momentum = self.momentum[name] = change.clone()
            change = change.add(momentum, alpha=self._factor)
        start.add_(change, alpha=self._lr)
