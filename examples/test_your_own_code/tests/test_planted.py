"""Two bugs planted in the ring. `pytest --runxfail tests/test_planted.py` shows how the harness tells of them."""

from __future__ import annotations

import pytest
import torch
from ring import pass_on_that_stalls, ring_all_reduce, ring_all_reduce_off_by_one


@pytest.mark.distributed(world_size=2)
def test_two_ranks_do_not_see_the_first_bug() -> None:
    tensor = torch.arange(4)
    ring_all_reduce_off_by_one(tensor)
    assert tensor.tolist() == [0, 2, 4, 6]


@pytest.mark.xfail(reason="the planted bug", strict=True)
@pytest.mark.distributed(world_size=3)
def test_three_ranks_see_it() -> None:
    tensor = torch.arange(6)
    ring_all_reduce_off_by_one(tensor)
    assert tensor.tolist() == [0, 3, 6, 9, 12, 15]


@pytest.mark.xfail(reason="the other planted bug", strict=True)
@pytest.mark.distributed(world_size=2, timeout_s=3)
def test_a_ring_that_stalls() -> None:
    ring_all_reduce(torch.arange(6), pass_on=pass_on_that_stalls)
