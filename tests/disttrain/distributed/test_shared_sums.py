"""Sums in memory that the workers of one machine share."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from disttrain.distributed import shared_memory
from disttrain.distributed.shared_sums import SharedSums, shared_sums
from disttrain.errors import is_lost_peer

TIMEOUT_S = 240.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.complex64)


def numbers(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank adds: nothing that could be added in another order to the same bits."""
    generator = torch.Generator().manual_seed(100 * rank + count)
    return (torch.randn(count, generator=generator) * 1000).to(dtype)


def opened() -> SharedSums:
    sums = shared_sums(dist.get_rank(), dist.get_world_size(), TIMEOUT_S)
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

    impatient = shared_sums(rank, 3, 0.0)  # a second
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
    assert shared_sums(rank, 2, TIMEOUT_S) is None
