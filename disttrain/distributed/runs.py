"""Lists of tensors cut into runs: so few numbers that what is made of one is still in a core's cache when it is read.

What a run is turned into then also comes from memory that is mapped already: mapping and reading it again takes longer
than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# A run of integers takes less than glibc maps anew, see `return_freed_memory`. GPUs are slower to start on one.
_MOST_NUMBERS = {"cpu": 1 << 16}
_MOST_NUMBERS_ELSEWHERE = 1 << 20


@dataclass(frozen=True)
class Segment:
    """The numbers from `start` up to `end`, exclusive, of a tensor, as far as it has them."""

    index: int
    """Which of a list of tensors."""
    start: int
    end: int


Run = Sequence[Segment]


def runs_of(sizes: Sequence[int], device: torch.device) -> list[list[Segment]]:
    """Cut tensors of these sizes, one after the other, into runs."""
    most = _MOST_NUMBERS.get(device.type, _MOST_NUMBERS_ELSEWHERE)
    runs: list[list[Segment]] = []
    left = 0
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            if not left:
                runs.append([])
                left = most
            end = min(size, start + left)
            runs[-1].append(Segment(index, start, end))
            left -= end - start
            start = end
    return runs


def cut(tensors: Sequence[torch.Tensor], run: Run) -> list[torch.Tensor]:
    """A run's numbers of each of its tensors, see `part`."""
    return [part(tensors[segment.index], segment) for segment in run]


def part(tensor: torch.Tensor, segment: Segment) -> torch.Tensor:
    """A segment of a contiguous tensor, (numbers,), in the same memory; or the tensor itself if that is all it has.

    A worker may have fewer numbers of a tensor than the runs were cut for, or none that are in the segment.
    """
    is_all = segment.start == 0 and segment.end == tensor.numel()
    return tensor if is_all else tensor.view(-1)[segment.start : segment.end]
