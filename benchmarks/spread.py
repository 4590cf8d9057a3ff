"""What a few measurements show, in numbers: how far they spread, and where their median is likely to be."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

_CONFIDENCE = 0.95


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper one; a single value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def interval_of_median(values: Sequence[float]) -> tuple[float, float] | None:
    """An interval that has the true median with a probability of 95 % at least; None if they are fewer than six.

    It assumes nothing of how they are distributed, only that they are independent: the true median is above as many of
    them as a coin shows heads.
    """
    ordered, size, outside = sorted(values), len(values), 0.0
    for rank in range(size // 2):
        outside += 2 * math.comb(size, rank) / 2**size
        if outside > 1 - _CONFIDENCE:
            return (ordered[rank - 1], ordered[size - rank]) if rank else None
    return None
