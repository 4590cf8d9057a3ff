"""How gradients travel to the workers that sum them: in runs of numbers, through memory that is kept for the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from disttrain.distributed.collectives import wait_for
from disttrain.distributed.runs import Run

# So many runs, over all ranks, travel together, while as many are summed: a message has its price, too.
_MOST_RUNS = 8


def together(runs: Sequence[Run], num_ranks: int) -> list[Sequence[Run]]:
    """The runs that travel together, if each of so many ranks gets its own of them."""
    num = max(1, _MOST_RUNS // num_ranks)
    return [runs[first : first + num] for first in range(0, len(runs), num)]


class Dealer:
    """Sends each rank of a group what is its own, and keeps the memory in which that is put together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._sent, self._received = [torch.empty(0)] * 2, [torch.empty(0)] * 2
        self._turn = 0

    def begin(self, pieces: Sequence[Sequence[torch.Tensor]], size: int) -> Callable[[], torch.Tensor]:
        """Begin to deal out `pieces`, which are for each rank; a call of what is returned waits for the others'.

        It gives what each rank has for this one, (ranks, size), until the second next begins. Pieces are flat and of
        one type. Every rank of the group must call it.
        """
        sizes = [sum(map(torch.numel, of_rank)) for of_rank in pieces]
        like, turn = pieces[0][0], self._turn
        self._turn = 1 - turn
        self._sent[turn] = _room(self._sent[turn], sum(sizes), like)
        self._received[turn] = _room(self._received[turn], size * len(sizes), like)
        sent, received = self._sent[turn][: sum(sizes)], self._received[turn][: size * len(sizes)]
        torch.cat([piece for of_rank in pieces for piece in of_rank], out=sent)
        work = dist.all_to_all_single(received, sent, [size] * len(sizes), sizes, self._group, async_op=True)

        def finish() -> torch.Tensor:
            if work is not None:
                wait_for(work)
            return received.view(len(sizes), size)

        return finish


def _room(kept: torch.Tensor, size: int, like: torch.Tensor) -> torch.Tensor:
    is_enough = kept.numel() >= size and (kept.dtype, kept.device) == (like.dtype, like.device)
    return kept if is_enough else like.new_empty(size)
