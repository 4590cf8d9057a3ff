"""Sums of workers on several machines: in shared memory within each, and by gloo between them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from disttrain.distributed import shared_memory
from disttrain.distributed import shared_sums as shared_sums_module
from disttrain.distributed.collectives import num_issued, sum_
from disttrain.distributed.regroup import rejoin
from disttrain.distributed.shared_sums import SharedSums, shared_sums
from disttrain.distributed.verdicts import Verdict
from disttrain.distributed.world import join_world
from disttrain.errors import is_lost_peer
from disttrain.testing import hosts, run_workers
from tests.disttrain.distributed.test_shared_sums import DTYPES, TIMEOUT, TIMEOUT_S, numbers

needs_hosts = pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))


def on_machines(monkeypatch: pytest.MonkeyPatch, machines: str, rank: int) -> None:
    """Have this rank take itself for one of the machine that `machines` has a letter for: "aab"."""
    monkeypatch.setattr(shared_memory, "_machine", lambda: machines[rank])


def fails_to_meet(*_: object) -> None:
    raise RuntimeError("another machine did not come")


def opened() -> SharedSums:
    sums = shared_sums(dist.get_rank(), TIMEOUT)
    assert sums is not None
    return sums


@pytest.mark.distributed(world_size=4)
@pytest.mark.parametrize(("machines", "workers"), [("abbb", (1, 3)), ("abab", (2, 2)), ("abca", (2, 1, 1))])
def test_each_machine_is_added_up_first_and_then_what_the_machines_have(
    rank: int, monkeypatch: pytest.MonkeyPatch, machines: str, workers: Sequence[int]
) -> None:
    on_machines(monkeypatch, machines, rank)
    sums = opened()
    assert sums.workers == workers
    before = num_issued(torch.device("cpu"), sums)
    for dtype in DTYPES:
        # One number; several pieces, the last of an odd size; more pieces than can be under way at once.
        for count in (1, 300_001, 1_500_000) if dtype is torch.int64 else (1, 300_001):
            of_machines = []
            for machine in sorted({*machines}):
                first, *others = [numbers(other, count, dtype) for other in range(4) if machines[other] == machine]
                for other in others:
                    first = first + other
                of_machines.append(first)
            mine = sums.sum_(numbers(rank, count, dtype))
            if len(workers) == 2:  # added in one order; for more machines it is that of gloo
                assert torch.equal(mine, of_machines[0] + of_machines[1]), (dtype, count)
            everywhere = [torch.empty_like(mine) for _ in range(4)]
            dist.all_gather(everywhere, mine)
            assert all(torch.equal(mine, other) for other in everywhere), (dtype, count)
            if dtype is torch.int64:
                assert torch.equal(mine, sum(of_machines[1:], of_machines[0]))
    several = [torch.full((count,), 1.0 + rank) for count in (3, 1000, 2_000_000, 5)]
    for tensor in several:
        sums.begin_(tensor, divisor=4)
    rounded = torch.tensor([1 + rank * 2**-9, torch.nan if rank == 3 else 0.0, torch.inf if rank == 1 else 0.0])
    sums.begin_(rounded, sent_as=torch.bfloat16)
    sums.finish()
    assert all((tensor == 2.5).all() for tensor in several)
    assert rounded[0].item() == 4.0, "it was not rounded before it was added"
    assert rounded[1].isnan()
    assert rounded[2].item() == torch.inf
    begun = num_issued(torch.device("cpu"), sums) - before
    every = [torch.zeros((), dtype=torch.int64) for _ in range(4)]
    dist.all_gather(every, torch.tensor(begun))
    assert len({*map(int, every)}) == 1, "the watchdog would take some for being behind"
    dist.barrier()
    sums.close()


@pytest.mark.distributed(world_size=3)
def test_a_machine_whose_first_worker_does_not_meet_the_others_is_left_with_nothing_to_wait_for(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machines(monkeypatch, "abb", rank)
    of_before = threading.active_count()
    if rank == 2:
        sums = opened()
        with pytest.raises(RuntimeError, match="rank 1 has gone"):
            sums.sum_(torch.ones(1))
        sums.close()
    else:
        monkeypatch.setattr(shared_sums_module, "BetweenMachines", fails_to_meet)
        with pytest.raises(RuntimeError, match="did not come") as caught:
            shared_sums(rank, TIMEOUT)
        dist.barrier()  # the error, which holds all there was, lives until then
        assert caught.value.args
    if rank == 2:
        dist.barrier()
    assert threading.active_count() == of_before


@pytest.mark.distributed(world_size=2)
def test_machines_of_one_worker_share_nothing(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on_machines(monkeypatch, "ab", rank)
    assert shared_sums(rank, TIMEOUT) is None


def _sent() -> int:
    """Bytes that this machine has sent to others."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if "eth0:" in line)
    return int(line.partition(":")[2].split()[8])


@needs_hosts
@pytest.mark.distributed(world_size=4, hosts=2)
def test_two_machines_send_one_sum_each_however_many_workers_they_have(rank: int) -> None:
    sums = opened()
    mine = torch.arange(1_000_000) * (rank + 1)
    sums.sum_(torch.ones(1))
    dist.barrier()
    before = _sent()
    sums.sum_(mine)
    dist.barrier()
    sent = _sent() - before
    assert torch.equal(mine, torch.arange(1_000_000) * 10)
    # Between two, each sends half of its numbers and then half of the sum. Through gloo alone it was half as much more.
    assert 8_000_000 <= sent < 9_500_000
    sums.close()


def _losses(machines: str) -> list[float]:
    """Of four ranks, those of machine "b" are lost one by one. What the others sum before each loss, and after."""
    started = int(os.environ["RANK"])
    shared_memory._machine = lambda: machines[started]
    found, alive = [], [0, 1, 2, 3]
    with join_world("cpu", threads=1, timeout_s=60, most_sharing_memory=9) as world:
        for generation, lost in enumerate([rank for rank in alive if machines[rank] == "b"], 1):
            add = sum_ if world.sums is None else world.sums.sum_
            found.append(add(torch.full((600_000,), started)).sum().item() / 600_000)
            if started == lost:
                world.leave_group()
                return found
            began = time.monotonic()
            try:
                while True:  # one that was late for the last of them has it all the same
                    add(torch.ones(600_000))
            except RuntimeError as error:
                assert is_lost_peer(error), error
                assert time.monotonic() - began < 50, "it was not noticed at once"
                world.leave_group()
            alive.remove(lost)
            world = rejoin(world, Verdict(generation, alive.index(started), len(alive)), lambda: False)
            assert (world.sums is not None) == (len({machines[rank] for rank in alive}) < len(alive))
        add = sum_ if world.sums is None else world.sums.sum_
        found.append(add(torch.full((1,), started)).item())
        world.leave_group()
    return found


@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        # The first of a machine, and then the machine; another one of it last.
        ("aabb", [[6, 4, 1], [6, 4, 1], [6], [6, 4]]),
        # One of the only two that share: the others share nothing.
        ("abbc", [[6, 5, 3], [6], [6, 5], [6, 5, 3]]),
    ],
)
def test_survivors_of_a_machine_s_workers_sum_in_the_memory_of_those_who_are_left(
    machines: str, expected: Sequence[Sequence[int]]
) -> None:
    found = run_workers(_losses, 4, args=(machines,), process_group=False, check_collectives=False, timeout_s=TIMEOUT_S)
    assert found == expected
