"""How the numbers of a comparison are summed up."""

from __future__ import annotations

import math

import pytest

from benchmarks.spread import interval_of_median, quartiles


def test_a_single_round_is_all_three_quartiles() -> None:
    """Each comparison takes --rounds 1."""
    assert quartiles([1.5]) == (1.5, 1.5, 1.5)
    assert quartiles([3.0, 1.0, 2.0]) == (1.0, 2.0, 3.0)


# The ranks that tables of the sign test's interval have.
@pytest.mark.parametrize(
    ("size", "ranks"), [(6, (1, 6)), (9, (2, 8)), (10, (2, 9)), (20, (6, 15)), (40, (14, 27)), (100, (40, 61))]
)
def test_the_interval_holds_the_median_19_times_in_20(size: int, ranks: tuple[int, int]) -> None:
    low, high = ranks
    assert interval_of_median([float(size - index) for index in range(size)]) == (low, high)
    outside = [2 * sum(math.comb(size, k) for k in range(rank)) / 2**size for rank in (low, low + 1)]
    assert outside[0] <= 0.05 < outside[1]


@pytest.mark.parametrize("size", range(1, 6))
def test_few_values_have_no_interval(size: int) -> None:
    assert interval_of_median([1.0] * size) is None
