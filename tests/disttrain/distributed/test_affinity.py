"""Workers keep to the NUMA node whose memory is near, where there are several."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from disttrain.distributed import affinity
from disttrain.distributed.affinity import cores_for, near_memory


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    for number, cores in ((0, "0-3,8-11"), (1, "4-7,12-15"), (10, "")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(f"{cores}\n")
    return tmp_path


def test_workers_are_dealt_out_over_the_nodes(two_nodes: Path) -> None:
    first, second = {0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}
    everything = first | second
    assert [cores_for(rank, 4, everything, two_nodes) for rank in range(4)] == [first, first, second, second]
    assert [cores_for(rank, 3, everything, two_nodes) for rank in range(3)] == [first, first, second]
    assert cores_for(1, 2, {0, 1, 5}, two_nodes) == {5}


def test_where_there_is_nothing_to_choose_nothing_is_bound(two_nodes: Path, tmp_path: Path) -> None:
    assert cores_for(0, 1, set(range(16)), two_nodes) is None  # a lone worker has all the memory to itself
    assert cores_for(0, 2, {0, 1}, two_nodes) is None  # a container with the cores of one node
    assert cores_for(0, 2, {0, 1}, tmp_path / "nothing") is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds processes to cores")
def test_the_cores_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    monkeypatch.setattr(affinity, "cores_for", lambda *_: one)
    with near_memory(0, 2):
        assert os.sched_getaffinity(0) == one
    assert os.sched_getaffinity(0) == before
