"""How gradients travel to the workers that sum them: in runs of numbers, through memory that is kept for the next.

A run is turned into integers at once. On CPUs it is so short that all of it is still in the cache, and that what it is
turned into comes from memory that is mapped already: mapping and reading it again took longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

# A run of integers takes less than glibc maps anew, see `return_freed_memory`. GPUs are slower to start on one.
_MOST_NUMBERS = {"cpu": 1 << 16}
_MOST_NUMBERS_ELSEWHERE = 1 << 20
# So many runs, over all ranks, travel together: a message has its price, too.
_MOST_RUNS = 16


@dataclass(frozen=True)
class Segment:
    """The numbers from `start` up to `end`, exclusive, of a rank's part of a tensor, as far as the part has them."""

    index: int
    """Which of a list of tensors."""
    start: int
    end: int


Run = Sequence[Segment]


def runs_of(sizes: Sequence[int], device: torch.device) -> list[list[Segment]]:
    """Cut parts of these sizes, the largest that a rank has of each tensor, into runs."""
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


def together(runs: Sequence[Run], num_ranks: int) -> list[Sequence[Run]]:
    """The runs that travel together, if each of so many ranks gets its own of them."""
    num = max(1, _MOST_RUNS // num_ranks)
    return [runs[first : first + num] for first in range(0, len(runs), num)]


class Dealer:
    """Sends each rank of a group what is its own, and keeps the memory in which that is put together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._sent = self._received = torch.empty(0)

    def deal(self, pieces: Sequence[Sequence[torch.Tensor]], size: int) -> torch.Tensor:
        """What each rank has for this one, (ranks, size), until the next call; `pieces` are for each rank.

        Pieces are flat and of one type. Every rank of the group must call it.
        """
        sizes = [sum(map(torch.numel, of_rank)) for of_rank in pieces]
        like = pieces[0][0]
        self._sent = _room(self._sent, sum(sizes), like)
        self._received = _room(self._received, size * len(sizes), like)
        sent, received = self._sent[: sum(sizes)], self._received[: size * len(sizes)]
        torch.cat([piece for of_rank in pieces for piece in of_rank], out=sent)
        dist.all_to_all_single(received, sent, [size] * len(sizes), sizes, self._group)
        return received.view(len(sizes), size)


def _room(kept: torch.Tensor, size: int, like: torch.Tensor) -> torch.Tensor:
    is_enough = kept.numel() >= size and (kept.dtype, kept.device) == (like.dtype, like.device)
    return kept if is_enough else like.new_empty(size)
