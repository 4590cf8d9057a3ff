"""Workers keep to the NUMA node whose memory is near, where there are several."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from disttrain.distributed import affinity
from disttrain.distributed.affinity import cores_for, near_memory, node_of
from disttrain.distributed.device import pci_address


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


def test_a_worker_keeps_to_the_node_of_its_gpu(two_nodes: Path, tmp_path: Path) -> None:
    for address, node in (("0000:17:00.0", "1\n"), ("0000:18:00.0", "-1\n"), ("0000:19:00.0", "7\n")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "numa_node").write_text(node)
    nodes = [node_of(f"0000:{bus}:00.0", tmp_path) for bus in (17, 18, 19, 20)]
    assert nodes == [1, None, 7, None]
    first, second = {0, 1, 2, 3}, {4, 5, 6, 7}
    found = [cores_for(0, 4, first | second, two_nodes, near=node) for node in nodes]
    assert found == [second, first, first, first]  # where its node is not known, or has no cores for it: as without
    assert cores_for(0, 1, first | second, two_nodes, near=1) is None


def test_a_gpus_place_is_written_as_linux_does(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xCA, pci_device_id=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert pci_address(torch.device("cuda", 3)) == "0000:ca:01.0"
    assert pci_address(torch.device("cpu")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds processes to cores")
def test_the_cores_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    monkeypatch.setattr(affinity, "cores_for", lambda *_, **__: one)
    with near_memory(0, 2):
        assert os.sched_getaffinity(0) == one
    assert os.sched_getaffinity(0) == before
