"""A worker's place in the world, and the collectives that everything else is built on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from disttrain.collectives import Agreement, decided_by_main, gather_objects, one_per_machine_first, sum_
from disttrain.errors import ConfigurationError, DisttrainError
from disttrain.world import choose_device, join_world


@pytest.fixture(autouse=True)
def _no_launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("distributed"):
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_one_worker_has_a_process_group_too_and_leaves_it() -> None:
    threads = torch.get_num_threads()
    with join_world("cpu", threads=1) as world:
        assert (world.rank, world.size, world.local_size, world.num_nodes) == (0, 1, 1, 1)
        assert dist.is_initialized()
        assert torch.get_num_threads() == 1
        assert sum_(torch.tensor([3.0])).item() == 3.0
    assert not dist.is_initialized()
    assert torch.get_num_threads() == threads


def test_the_group_is_left_when_the_block_fails() -> None:
    with pytest.raises(RuntimeError, match="on purpose"), join_world("cpu"):
        raise RuntimeError("on purpose")
    assert not dist.is_initialized()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted under /proc")
def test_leaving_ends_the_groups_threads() -> None:
    """A thread of gloo's that lives on may abort the process while Python shuts down."""
    script = """
from pathlib import Path
import torch
from disttrain.world import join_world

with join_world("cpu"):
    model = torch.nn.Linear(1, 1)
    model(torch.ones(1)).backward()
    torch.optim.SGD(model.parameters()).step()  # imports much of torch, while the group is there
print(*(task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout
    assert "gloo" not in ended.stdout


def test_a_launcher_that_forgets_a_variable_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigurationError, match=r"LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        join_world(),
    ):
        pass


@pytest.mark.parametrize(("name", "value"), [("RANK", "two"), ("RANK", "5"), ("LOCAL_WORLD_SIZE", "9")])
def test_a_launcher_that_sets_nonsense_is_told_so(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x"}
    for key, text in {**place, "MASTER_PORT": "1", name: value}.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(ConfigurationError, match=f"{name}="), join_world():
        pass


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto", 0, 1) == torch.device("cpu")
    with pytest.raises(ConfigurationError, match="sees no GPU"):
        choose_device("cuda", 0, 1)
    with pytest.raises(ConfigurationError, match="no Apple GPU"):
        choose_device("mps", 0, 1)


def test_each_worker_has_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1, 2) == torch.device("cuda", 1)
    with pytest.raises(ConfigurationError, match="worker 2 of this machine has no GPU of its own"):
        choose_device("auto", 2, 3)


# These workers join the world by themselves, as those of a launcher do, so the harness leaves that to them.
three_workers = pytest.mark.distributed(world_size=3, process_group=False)


@three_workers
def test_workers_find_their_places(rank: int) -> None:
    with join_world("cpu") as world:
        assert (world.rank, world.local_rank, world.size, world.local_size) == (rank, rank, 3, 3)
        assert (world.node, world.num_nodes, world.is_main) == (0, 1, rank == 0)


@three_workers
def test_one_worker_of_the_machine_passes_the_gate_before_the_others(tmp_path: Path, rank: int) -> None:
    with join_world("cpu") as world:
        with one_per_machine_first(world):
            passed_before = sorted(path.name for path in tmp_path.iterdir())
            (tmp_path / str(rank)).touch()
        assert ("0" in passed_before) == (rank != 0)
        assert gather_objects(rank) == [0, 1, 2]


@three_workers
@pytest.mark.parametrize("kind", [ConfigurationError, ValueError])
def test_a_failure_of_the_first_is_everybodys(rank: int, kind: type[Exception]) -> None:
    with join_world("cpu") as world:
        expected = kind if rank == 0 else DisttrainError
        arrived = []
        with pytest.raises(expected, match="the disk is full"), one_per_machine_first(world):  # noqa: PT012
            arrived.append(rank)
            raise kind("the disk is full")
        assert arrived == ([0] if rank == 0 else []), "nobody else gets this far"


@three_workers
def test_rank_0_decides_for_all_and_fails_for_all(rank: int) -> None:
    def fail() -> None:
        raise ConfigurationError("no")

    with join_world("cpu") as world:
        assert decided_by_main(world, lambda: 40 + rank) == 40
        with pytest.raises(ConfigurationError, match="no"):
            decided_by_main(world, fail)


@three_workers
@pytest.mark.parametrize("who", [0, 1, 2])
def test_all_ranks_learn_of_a_flag_at_the_same_step(rank: int, who: int) -> None:
    with join_world("cpu"):
        agreement = Agreement(num_flags=2)
        answers = [agreement.ask(False, rank == who and step == 1) for step in range(3)]
        nothing, raised = [False, False], [False, True]
        assert [*answers, agreement.finish()] == [nothing, nothing, raised, nothing]
