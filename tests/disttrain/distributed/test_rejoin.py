"""A process group that breaks, and the one that takes its place."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from disttrain.distributed.agreement import Agreement
from disttrain.distributed.collectives import broadcast_object, gather_objects, interruptible, sum_
from disttrain.distributed.connections import Connections
from disttrain.distributed.regroup import rejoin
from disttrain.distributed.shared_sums import shared_sums
from disttrain.distributed.verdicts import Verdict, Verdicts
from disttrain.distributed.world import join_world
from disttrain.errors import is_lost_peer
from disttrain.testing import run_workers


def _loses_rank_2() -> tuple[float, float]:
    """Of four ranks, the third goes in the middle. What the others sum in a group of three, and in one of two."""
    with join_world("cpu", threads=1, timeout_s=60, most_sharing_memory=9) as world:
        assert sum_(torch.ones(1)).item() == 4.0
        if world.rank == 2:
            world.leave_group()
            return 0.0, 0.0
        agreement = Agreement(num_flags=1)
        try:
            while True:  # rank 0 may wait for one that is there
                agreement.ask(False)
                sum_(torch.ones(1000))
        except RuntimeError as error:  # whose traceback keeps the old group, as in a real loss
            assert is_lost_peer(error)
            world.leave_group()
            if world.rank == 0:  # as after a group that failed to form: torch has counted it
                dist.destroy_process_group()
                dist.distributed_c10d._world.group_count += 5
            three = rejoin(world, Verdict(1, [0, 1, 3].index(world.rank), 3), lambda: False)
            first = sum_(torch.full((1,), float(world.rank))).item()
            assert three.sums is not None
            assert three.sums.sum_(torch.ones(1)).item() == 3.0, "the memory is not that of the new group"
            three.leave_group()
            if three.rank == 1:
                return first, 0.0
            two = rejoin(three, Verdict(2, [0, 2].index(three.rank), 2), lambda: False)
            assert (two.rank, two.size, dist.get_world_size()) == ([0, 2].index(three.rank), 2, 2)
            return first, sum_(torch.ones(1)).item()


def test_survivors_form_a_group_and_another() -> None:
    assert run_workers(_loses_rank_2, 4, process_group=False, check_collectives=False) == [
        (4.0, 2.0),
        (4.0, 0.0),
        (0.0, 0.0),
        (4.0, 2.0),
    ]


def _waits_for_an_object(collective: Callable[[int], object]) -> str:
    """Rank 1 does not come, and its connections stay as they are. What rank 0 gets."""
    with join_world("cpu", threads=1, timeout_s=60) as world:
        assert world.group is not None
        assert world.group.store is not None
        if world.rank == 1:
            world.group.store.wait(["given up"])
            return ""
        try:
            with interruptible(lambda: True):
                collective(0)
        except RuntimeError as error:
            assert is_lost_peer(error)
            return str(error)
        finally:
            world.group.store.set("given up", "")
            world.leave_group()
    return "nothing"


def _shares_memory(rank: int) -> None:
    shared_sums(rank, timedelta(seconds=600))


@pytest.mark.parametrize("collective", [gather_objects, broadcast_object, _shares_memory])
def test_who_waits_for_objects_is_freed_by_a_verdict(collective: Callable[[int], object]) -> None:
    """Of a machine that is cut off, no closed connection tells."""
    waited, _ = run_workers(
        _waits_for_an_object, 2, args=(collective,), process_group=False, check_collectives=False, timeout_s=60
    )
    assert "whose connections are broken" in waited


def test_a_cut_spares_the_store_and_a_descriptor_that_has_a_new_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as store:
        connections = Connections()
        with connections.noted(store.getsockname()[1]):
            ours, kept, gone = (socket.create_connection(at.getsockname()) for at in (server, store, server))
        taken = os.dup(kept.fileno())
        os.dup2(taken, gone.fileno())  # gone is closed, and its number is another socket's
        assert len(connections) == 2
        connections.cut()
        assert ours.recv(1) == b""
        kept.send(b"x")
        os.close(taken)
        for connection in (ours, kept, gone):
            connection.close()


def test_a_default_timeout_of_the_program_neither_reaches_the_connections_nor_breaks_them() -> None:
    """Torch reads from its store by a socket that blocks."""
    before, connections = socket.getdefaulttimeout(), Connections()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as store:
        socket.setdefaulttimeout(60.0)
        try:
            with connections.noted(0):
                group = os.dup(store.fileno())
            peer, _ = server.accept()
            assert len(connections) == 1
            assert not connections.are_broken()
            assert os.get_blocking(store.fileno())
            peer.close()
            assert connections.are_broken()
            os.close(group)
        finally:
            socket.setdefaulttimeout(before)


def test_verdicts_are_read_in_order_and_announced() -> None:
    reader, writer = os.pipe()
    verdicts = Verdicts(reader)
    assert not verdicts.have_come()
    assert verdicts.wait(0.0) is None
    sent = [Verdict(1, 2, 3, lost="rank 1", lost_ranks=(1,), time=5.0), Verdict(2, None)]
    for verdict in sent:
        os.write(writer, verdict.line())
    assert verdicts.have_come()
    assert [verdicts.wait(60.0), verdicts.wait(60.0)] == sent
    os.close(writer)
    assert verdicts.wait(60.0) is None, "the launcher has ended"
    os.close(reader)
