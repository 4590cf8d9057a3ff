"""What exact mode does with the gradients of a step of 4 slices, part by part: `parts.py --exact`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from step import BATCH

from disttrain.distributed.collectives import sum_
from disttrain.distributed.fixed_point import FixedPointSum, expected_magnitudes, measured
from disttrain.parallel.exact.strategy import SlicesSummed
from disttrain.training.monitor import RunMonitor

EXACT = ("parallel.exact=true", "parallel.slices=4")


def parts_of_exact(monitor: RunMonitor) -> dict[str, Callable[[], object]]:
    """What exact mode does with the gradients of a step, which are zeros here, so that their sums are, too."""
    job = monitor.job
    strategy, world = job.strategy, job.world
    assert isinstance(strategy, SlicesSummed)
    parameters = list(job.model.parameters())
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    lists = [gradients] * len(strategy.slices)
    bounds = [0.0] * len(gradients)
    integers = torch.zeros(sum(map(torch.numel, gradients)), dtype=torch.int64)
    total = FixedPointSum(gradients, bounds, strategy.num_slices)

    def slices() -> None:
        for index in strategy.slices:
            strategy.open_slice()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            strategy.close_slice(index)

    def as_integers() -> None:
        FixedPointSum(gradients, bounds, strategy.num_slices, integers).add(*lists)

    def step() -> None:
        slices()
        strategy.finish_step(BATCH, 0)

    def slices_alone() -> None:
        slices()
        strategy._sums._begin_step()

    return {
        "slices, and their sum": step,
        "slices opened and closed": slices_alone,
        "their magnitudes": lambda: measured(lists),
        "their integers": as_integers,
        "integers summed": lambda: (sum_ if world.sums is None else world.sums.sum_)(integers),
        "numbers again": lambda: total.write(gradients),
        "the next step's bounds": lambda: expected_magnitudes(gradients, bounds),
    }
