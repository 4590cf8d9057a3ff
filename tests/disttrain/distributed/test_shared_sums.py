"""Sums in memory that the workers of one machine share."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from disttrain.distributed import shared_memory
from disttrain.distributed.shared_sums import SharedSums, shared_sums
from disttrain.errors import is_lost_peer

TIMEOUT_S = 240.0
TIMEOUT = timedelta(seconds=TIMEOUT_S)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.complex64)


def numbers(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank adds: nothing that could be added in another order to the same bits."""
    generator = torch.Generator().manual_seed(100 * rank + count)
    return (torch.randn(count, generator=generator) * 1000).to(dtype)


def opened() -> SharedSums:
    sums = shared_sums(dist.get_rank(), TIMEOUT)
    assert sums is not None
    return sums


@pytest.mark.distributed(world_size=[2, 3])
def test_numbers_are_added_in_the_order_of_the_ranks(rank: int, world_size: int) -> None:
    sums = opened()
    for dtype in DTYPES:
        # One number; fewer bytes than are worth meeting twice for; several pieces, the last of an odd size.
        for count in (1, 1000, 300_001):
            mine = numbers(rank, count, dtype)
            expected = numbers(0, count, dtype)
            for other in range(1, world_size):
                expected = expected + numbers(other, count, dtype)
            assert torch.equal(sums.sum_(mine.clone()), expected), (dtype, count)
            if world_size == 2:
                dist.all_reduce(mine)
                assert torch.equal(mine, expected), f"gloo's bits differ for {dtype}"
    # More than can be under way at once, each divided and rounded.
    several = [torch.full((count,), 1.0 + rank) for count in (3, 1000, 2_000_000, 5)]
    for tensor in several:
        sums.begin_(tensor, divisor=world_size)
    rounded = torch.tensor([1 + rank * 2**-9])
    sums.begin_(rounded, sent_as=torch.bfloat16)
    sums.finish()
    assert all((tensor == (world_size + 1) / 2).all() for tensor in several)
    assert rounded.item() == world_size, "it was not rounded before it was added"
    # Numbers that are written there and taken from there, in order; also where one needs no second meeting.
    sizes, taken = (100_000, 5, 131_072, 1000), []
    for size in sizes:
        sums.begin_with(
            size,
            torch.int64,
            lambda place: place.fill_(1 + rank),
            lambda total: taken.append((len(total), total.unique().tolist())),
        )
    sums.finish()
    assert taken == [(size, [sum(range(1, world_size + 1))]) for size in sizes]
    sums.close()


@pytest.mark.distributed(world_size=3)
def test_one_that_waits_learns_at_once_that_another_has_gone_or_sums_something_else(rank: int) -> None:
    sums = opened()
    began = time.monotonic()
    if rank == 1:
        sums.close()
    else:
        with pytest.raises(RuntimeError, match="rank 1 has gone") as caught:
            sums.sum_(torch.ones(3))
        assert is_lost_peer(caught.value)
        sums.cut()
        with pytest.raises(RuntimeError) as caught:
            sums.sum_(torch.ones(3))
        assert is_lost_peer(caught.value)
    assert time.monotonic() - began < TIMEOUT_S
    dist.barrier()

    sums = opened()
    sums.begin_(torch.ones(4 if rank == 2 else 3))
    with pytest.raises(RuntimeError, match="does not sum what rank"):
        sums.finish()
    dist.barrier()
    sums.close()

    impatient = shared_sums(rank, timedelta(0))  # a second
    assert impatient is not None
    if rank == 0:
        with pytest.raises(RuntimeError, match="Timed out waiting for what rank 1") as caught:
            impatient.sum_(torch.ones(3))
        assert is_lost_peer(caught.value)
    dist.barrier()
    impatient.close()


@pytest.mark.distributed(world_size=2)
@pytest.mark.parametrize(("function", "of_rank"), [("_reserved", 0), ("socket.socket", 1), ("_accepted", 1)])
def test_where_one_rank_has_no_memory_none_has(
    rank: int, monkeypatch: pytest.MonkeyPatch, function: str, of_rank: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError

    if rank == of_rank:
        monkeypatch.setattr(f"{shared_memory.__name__}.{function}", fail)
    assert shared_sums(rank, TIMEOUT) is None


@pytest.mark.distributed(world_size=2)
def test_where_one_rank_has_no_thread_left_none_shares(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        if rank == 1:
            patch.setattr(threading.Thread, "start", fail)
        assert shared_sums(rank, TIMEOUT) is None


@pytest.mark.distributed(world_size=2)
def test_a_sum_that_is_closed_while_it_is_waited_for_ends_here_and_at_the_peer(rank: int) -> None:
    sums = opened()
    if rank == 0:
        errors: list[RuntimeError] = []

        def wait() -> None:
            try:
                sums.sum_(torch.ones(1))
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        while sums.num_begun == 0:
            time.sleep(0.01)
        time.sleep(0.5)  # until the socket is read
        sums.close()
        thread.join()
        assert is_lost_peer(errors[0])
    else:
        # The end of the connection, while the other rank's process goes on.
        assert sums._peers[0].recv(4096)
        assert sums._peers[0].recv(4096) == b""
    dist.barrier()


@pytest.mark.distributed(world_size=2)
def test_a_sum_whose_wait_was_interrupted_can_be_finished_later(rank: int) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    sums = opened()
    tensor, other = torch.full((3,), 1.0 + rank), torch.full((3,), 2.0 + rank)
    sums.begin_(tensor) if rank == 0 else None
    if rank == 0:
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            sums.finish()
        dist.barrier()
    else:
        dist.barrier()
        sums.begin_(tensor)
    sums.finish()
    assert tensor.tolist() == [3.0] * 3
    if rank == 1:
        time.sleep(0.2)  # the other rank waits for this one, and had an answer to what it asked before
    assert sums.sum_(other).tolist() == [5.0] * 3
    dist.barrier()
    sums.close()


@pytest.mark.distributed(world_size=2)
def test_a_process_that_a_worker_has_forked_does_not_cut_it_off_when_it_ends(rank: int) -> None:
    sums = opened()
    if rank == 0:
        child = os.fork()
        if not child:
            sums.close()  # as at its exit
            os._exit(0)
        os.waitpid(child, 0)
    dist.barrier()
    assert sums.sum_(torch.ones(1)).item() == 2.0
    dist.barrier()
    sums.close()
