"""Exact mode as a strategy: the same bits at every number of workers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from disttrain.distributed.fixed_point import ABSENT
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.parallel.exact.slices import ExactSlices
from disttrain.parallel.modules import refuse_renormalising, refuse_summing
from disttrain.parallel.strategy import Strategy

_EXPECTED = "expected_magnitudes"
_OR_FAST = "or set parallel.exact = false"


class SlicesSummed(Strategy):
    """What every way has in common that computes slices one by one and sums them as integers."""

    fills_empty = False
    bits_depend_on_world_size = False
    looks_at_sums = True
    slice_word = "slice"
    _sums: ExactSlices

    @property
    def non_finite(self) -> tuple[str, ...]:  # type: ignore[override]  # an attribute of the others
        """As `Strategy` has it: a sum of integers cannot hold what is not finite, so it is known before."""
        return self._sums.non_finite

    @property
    def sums_are_finite(self) -> bool:  # type: ignore[override]  # an attribute of the others
        """As `Strategy` has it: from the bounds of what was summed."""
        return self._sums.sums_are_finite

    def check_modules(self) -> None:
        """As `Strategy` has it."""
        refuse_summing(self.model, _OR_FAST)
        refuse_renormalising(self.model, _OR_FAST)

    def open_slice(self) -> None:
        """Give the model the buffers that the step started from."""
        self._sums.open()

    def close_slice(self, slice_index: int) -> None:
        """Take the slice's gradients, and what it changed in the buffers, out of the model."""
        self._sums.close(slice_index)

    def finish_step(self, global_size: int, step: int) -> None:
        """Give every worker's model the sums of the step. Every rank must call it."""
        self._sums.finish(min(global_size, self.num_slices))

    def sum_finite_parts(self, scale: float) -> None:
        """As `Strategy` has it."""
        self._sums.sum_finite_parts(scale)

    @property
    def expected(self) -> list[float] | None:
        """Bounds of the next step's gradients and buffers."""
        return self._sums.expected

    def rejoin(self, world: World, expected: list[float] | None) -> None:
        """Forget an unfinished step, which began with `expected`, and serve the slices of another place."""
        self._sums.rejoin(world, expected)
        self.slices = self._sums.slices

    def state(self) -> dict[str, Any]:
        """Bounds of the next step's gradients and buffers, by name."""
        expected = self._sums.expected
        return {_EXPECTED: None if expected is None else dict(zip(self._sums.summed, expected, strict=True))}

    def load_state(self, state: Mapping[str, Any], where: str) -> None:
        """As `Strategy` has it. A checkpoint of fast mode holds no bounds."""
        expected, names = state.get(_EXPECTED), self._sums.summed
        if expected is None:
            self._sums.expected = None
            return
        by_name = expected if isinstance(expected, dict) else dict(zip(names, expected, strict=False))  # a list, once
        bounds = [by_name.get(name, math.nan) for name in names]
        if len(expected) != len(names) or not all(bound == ABSENT or 0 <= bound < math.inf for bound in bounds):
            raise ConfigurationError(
                f"{where}: '{_EXPECTED}' should be {len(names)} bounds, one for each parameter and buffer."
            )
        self._sums.expected = bounds

    @property
    def cut_by(self) -> str:
        """As `Strategy` has it."""
        return f"parallel.slices = {self.num_slices}"

    def larger_slices(self) -> list[str]:
        """As `Strategy` has it."""
        return ["fewer slices", "parallel.exact = false"]


class Exact(SlicesSummed):
    """Slices computed one by one in the same shapes everywhere, and summed as integers."""

    name = "exact"

    def __init__(self, model: nn.Module, world: World, num_slices: int) -> None:
        """Every rank must call it: all start from rank 0's weights and buffers. Raises as `ExactSlices` does."""
        super().__init__(model, f"exact mode: {num_slices} slices, the same bits with 1 to {num_slices} workers")
        self._sums = ExactSlices(model, world, num_slices)
        self.slices, self.num_slices = self._sums.slices, num_slices

    def begin_sum(self) -> None:
        """As `Strategy` has it."""
        self._sums.begin_sum()

    def abandon_step(self) -> None:
        """As `Strategy` has it."""
        self._sums.abandon()

    def alone(self) -> Strategy:
        """As `Strategy` has it: slices are this worker's own until they are summed."""
        self._sums.forget()
        return self

    @property
    def audited(self) -> list[str]:
        """The names of the tensors that `checksums` and `checksums_apart` are of."""
        return self._sums.audited

    def checksums(self, slice_index: int) -> list[int]:
        """Checksums of what a slice, which this worker has closed in the step, adds to it."""
        return self._sums.checksums(slice_index)

    def checksums_apart(self, slice_index: int) -> list[int]:
        """The same for a slice that was computed once more, in place of closing it: it adds nothing to the step."""
        return self._sums.checksums_apart(slice_index)
