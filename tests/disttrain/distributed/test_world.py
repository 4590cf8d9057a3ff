"""A worker's place in the world, and the collectives that everything else is built on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from disttrain.distributed import agreement as agreement_module
from disttrain.distributed import cores
from disttrain.distributed import world as world_module
from disttrain.distributed.agreement import Agreement
from disttrain.distributed.collectives import (
    broadcast_from_main,
    gather_objects,
    num_issued,
    one_per_machine_first,
    sum_,
)
from disttrain.distributed.cores import num_threads
from disttrain.distributed.world import join_world, on_device
from disttrain.errors import ConfigurationError, DisttrainError
from disttrain.testing import run_workers


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


def test_a_program_that_goes_on_after_a_failure_does_not_wait_for_what_ranks_have_not_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "destroy_process_group", lambda *_: pytest.fail("NCCL may wait there forever"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world_module._leave_in_failure(torch.device("cuda", 0), size=2)
    assert not dist.is_initialized()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted under /proc")
def test_leaving_ends_the_groups_threads() -> None:
    """A thread of gloo's that lives on may abort the process while Python shuts down."""
    script = """
from pathlib import Path
import torch
from disttrain.distributed.world import join_world

with join_world("cpu"):
    model = torch.nn.Linear(1, 1)
    model(torch.ones(1)).backward()
    torch.optim.SGD(model.parameters()).step()  # imports much of torch, while the group is there
print(*(task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=480, check=True)
    assert ended.stdout
    assert "gloo" not in ended.stdout


def test_a_rank_that_is_quick_to_join_again_waits_for_the_others() -> None:
    """It would have met the store of the group before, while rank 0 was still on its way out."""

    def body() -> list[float]:
        sums = []
        for group in range(3):
            with join_world("cpu", threads=1) as world:
                total = torch.tensor([world.rank + 10.0 * group])
                dist.all_reduce(total)
                sums.append(float(total))
                dist.barrier()
                time.sleep(0.5 if world.is_main else 0)  # so the other joins again before rank 0 has left
        return sums

    assert run_workers(body, 2, process_group=False, check_collectives=False, timeout_s=240) == [[1.0, 21.0, 41.0]] * 2


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


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"OMP_NUM_THREADS": "many"}, 3),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 3),  # torchrun's own
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, 2),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "DISTTRAIN_LAUNCHER": "disttrain node"}, 1),
    ],
)
def test_threads_are_what_the_user_says_or_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 7)
    assert num_threads(2, environment) == expected
    assert num_threads(9, {}) == 1


def test_a_worker_takes_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with join_world("cpu"):
        assert torch.get_num_threads() == 3
    with join_world("cpu", threads=2):  # the recipe's word is the more particular one
        assert torch.get_num_threads() == 2


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
        assert broadcast_from_main(world, lambda: 40 + rank) == 40
        with pytest.raises(ConfigurationError, match="no"):
            broadcast_from_main(world, fail)


@three_workers
@pytest.mark.parametrize("who", [0, 1, 2])
def test_all_ranks_learn_of_a_flag_at_the_same_step(rank: int, who: int) -> None:
    with join_world("cpu"):
        agreement = Agreement(num_flags=2)
        answers = [agreement.ask(False, rank == who and step == 1) for step in range(3)]
        nothing, raised = [False, False], [False, True]
        assert [*answers, agreement.finish()] == [nothing, nothing, raised, nothing]


@three_workers
def test_short_steps_ask_less_often_and_all_learn_of_a_flag_at_the_same_step(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement_module, "_ASK_EVERY_S", 1e9)  # compared with it, each step is short
    with join_world("cpu") as world:
        agreement, begun = Agreement(num_flags=1), num_issued(world.device)
        learned = [step for step in range(200) if agreement.ask(rank == 1 and step >= 150)[0]]
        assert num_issued(world.device) - begun < 40
        agreement.ask(rank == 2, now=True)
        assert agreement.finish() == [True]
        assert gather_objects(learned) == [learned] * 3
        assert 150 < min(learned) <= 150 + 17


def listening_addresses() -> set[str]:
    """Where this process listens for TCP connections, in the kernel's hexadecimal."""
    mine = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            mine.add(os.readlink(entry))
        except FileNotFoundError:  # the one that lists the folder
            continue
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="sockets are listed under /proc")


@only_linux
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_other_machine_can_reach_the_workers_of_one_machine(host: str) -> None:
    def body() -> set[str]:
        os.environ.pop("GLOO_SOCKET_IFNAME")  # that of the harness
        os.environ["MASTER_ADDR"] = host
        with join_world("cpu") as world:
            sum_(torch.ones(1))
            found = listening_addresses()
            assert found or not world.is_main
            assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0"), "where the host's name leads is anybody's guess"
        assert "GLOO_SOCKET_IFNAME" not in os.environ
        return found

    found = run_workers(body, 2, process_group=False)
    assert found[0]
    assert set().union(*found) <= LOOPBACK


@only_linux
def test_a_lone_worker_listens_on_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with join_world("cpu"):
        assert listening_addresses() <= LOOPBACK


@only_linux
@pytest.mark.distributed(world_size=2)
def test_the_harness_listens_on_loopback_alone() -> None:
    assert listening_addresses() <= LOOPBACK


@pytest.mark.distributed(world_size=1, process_group=False)
def test_the_users_interface_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,lo")
    with join_world("cpu"):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo,lo"


def test_a_port_that_is_taken_is_named() -> None:
    def body(port: str) -> None:
        os.environ["MASTER_PORT"] = port
        if os.environ["RANK"] == "0":
            with (
                pytest.raises(DisttrainError, match=rf"MASTER_PORT = 127.0.0.1:{port}: Address already in use"),
                join_world("cpu"),
            ):
                pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        run_workers(body, 2, args=(str(taken.getsockname()[1]),), process_group=False)


# Devices. There is no GPU here: what torch says of them is put on.


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have torch see so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_tests_see_no_gpu() -> None:
    assert torch.cuda.device_count() == 0


@pytest.mark.distributed(world_size=2)
def test_tests_workers_see_no_gpu() -> None:
    assert torch.cuda.device_count() == 0


@three_workers
def test_a_mixture_of_devices_is_refused_on_every_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "choose_device", lambda *_: torch.device("meta" if rank == 1 else "cpu"))
    words = r"rank 0 would use cpu on .*, and rank 1 meta on .*: set train.device = 'cpu'"
    with pytest.raises(ConfigurationError, match=words), join_world("cpu"):
        pass


@pytest.mark.distributed(world_size=2, process_group=False)
def test_a_device_may_be_chosen_among_the_others(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with join_world("cpu") as world:
        assert on_device(world, "auto") == world
        pretend_gpus(monkeypatch, 1)
        assert on_device(world, "auto").device == torch.device("cpu")
        assert "2 workers on a machine with 1 GPU: all use the CPU" in on_device(world, "auto").remark
        monkeypatch.setattr(world_module, "choose_device", lambda *_: torch.device("meta" if rank else "cpu"))
        with pytest.raises(ConfigurationError, match="rank 1 meta"):
            on_device(world, "auto")
