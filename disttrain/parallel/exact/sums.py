"""The sums of a run's steps, each in the way that its workers have."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disttrain.distributed.exact_sum import exact_sum_
from disttrain.distributed.fixed_point import Summands
from disttrain.distributed.world import World
from disttrain.parallel.exact.ahead import SumAhead, integers_of, room_for


class StepSums:
    """Sums of gradients and of buffers' changes over all slices, which every rank must `finish`."""

    def __init__(
        self, parameters: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], world: World, num_slices: int
    ) -> None:
        self._parameters, self._world, self._num_slices = parameters, world, num_slices
        self._most = integers_of([*parameters, *buffers])
        self._by_collectives = world.size > 1 and world.sums is None
        self._ahead: SumAhead | None = None
        self._may_begin = True
        # Lives as long as the run: mapping that much memory anew at every step would cost more than the additions.
        self._scratch: torch.Tensor | None = None

    def begin(self, expected: Sequence[float] | None, closed: Sequence[Summands]) -> None:
        """Let a step's sum begin within the backward pass that follows, of the slice after those `closed`.

        Only where collectives make it and bounds are expected; elsewhere it begins at `finish`, see docs/decisions.md.
        """
        if self._may_begin and self._by_collectives and expected is not None:
            self._ahead = self._sum_ahead(expected)
            self._ahead.begin(closed)

    def close(self) -> None:
        """Send no more until `finish`."""
        if self._ahead is not None:
            self._ahead.close()

    def abandon(self) -> None:
        """Forget a sum that has begun."""
        self.close()
        self._ahead = None

    def finish(
        self, expected: Sequence[float] | None, summands: Sequence[Summands], changes: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[float]]:
        """The sums of gradients and `changes`, and bounds of their summands, as `exact_sum_` has them."""
        if self._by_collectives and expected is not None:  # the same on all ranks, whether or not each has begun
            ahead, self._ahead = self._ahead or self._sum_ahead(expected), None
            gradients = ahead.finish(summands, changes)
            if gradients is not None:
                return [*gradients, *changes], list(expected)
            # Something changes gradients after the backward pass has made them: it will in the next step, too.
            self._may_begin = self._may_begin and not ahead.was_changed
            expected = expected if ahead.was_changed else None
        gradients = [
            room_for(parameter, (each[index] for each in summands)) for index, parameter in enumerate(self._parameters)
        ]
        sums = [*gradients, *changes]
        agreed = exact_sum_(
            sums,
            summands,
            self._num_slices,
            shared=self._world.sums,
            expected=expected,
            scratch=self._room() if self._by_collectives else None,
            num_changes=len(changes),
        )
        return sums, agreed

    def _sum_ahead(self, expected: Sequence[float]) -> SumAhead:
        return SumAhead(self._parameters, expected, self._num_slices, self._room())

    def _room(self) -> torch.Tensor:
        if self._scratch is None:
            self._scratch = torch.empty(self._most, dtype=torch.int64, device=self._world.device)
        return self._scratch
