"""The ring, held against torch's own all_reduce, at several world sizes and awkward lengths."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ring import ring_all_reduce


@pytest.mark.distributed(world_size=[1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 7, 1000])
def test_sums_like_torch(rank: int, length: int) -> None:
    tensor = torch.arange(length, dtype=torch.float64) + rank
    expected = tensor.clone()
    dist.all_reduce(expected)
    ring_all_reduce(tensor)
    assert tensor.tolist() == expected.tolist()


@pytest.mark.distributed(world_size=2)
def test_keeps_the_shape(rank: int) -> None:
    tensor = torch.ones(2, 3)
    ring_all_reduce(tensor)
    assert tensor.shape == (2, 3)
    assert tensor.eq(2).all()
