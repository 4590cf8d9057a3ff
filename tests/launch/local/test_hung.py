"""Which workers are killed because they hold up the others: those of which nobody has a doubt."""

from __future__ import annotations

import pytest

from disttrain_launch.local.hung import hung_ranks


@pytest.mark.parametrize(
    ("reports", "killed"),
    [
        pytest.param({0: [], 1: [], 2: []}, set(), id="none is"),
        pytest.param({0: [2], 1: [2], 2: []}, {2}, id="a stopped one reports nothing"),
        pytest.param({0: [2], 1: [2], 2: [2]}, {2}, id="one that sleeps names itself"),
        pytest.param({0: [1, 2], 1: [2], 2: [], 3: [2]}, {2}, id="one was not heard in time, and merely waits"),
        pytest.param({0: [1, 2], 1: [], 2: [], 3: []}, set(), id="the first to report knows least"),
        pytest.param({0: [1, 2], 1: [], 2: [], 3: [2]}, set(), id="rank 1 has not said yet that it waits for rank 2"),
        pytest.param({0: [1, 2], 1: [], 2: [], 3: [1, 2]}, {1, 2}, id="two are stopped"),
        pytest.param({0: [1], 1: [2], 2: [1]}, set(), id="they contradict each other"),
        pytest.param({0: [5], 1: [5]}, set(), id="it has ended meanwhile"),
    ],
)
def test_only_who_is_named_by_all_others_is_killed(reports: dict[int, list[int]], killed: set[int]) -> None:
    assert hung_ranks(reports) == killed
