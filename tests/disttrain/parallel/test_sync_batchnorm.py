"""BatchNorm over the global batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from disttrain.distributed.world import join_world
from disttrain.parallel.sync_batchnorm import convert_sync_batchnorm


def whole_batch_gradient() -> tuple[nn.Sequential, torch.Tensor]:
    """A network with BatchNorm, and the images that its first backward pass has seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double()
    images = torch.rand(9, 1, 5, 5, dtype=torch.float64)
    return model, images


@pytest.mark.distributed(world_size=2, process_group=False)
def test_sync_batchnorm_computes_what_batchnorm_computes_on_the_whole_batch(rank: int, world_size: int) -> None:
    weights = torch.arange(2).view(1, 2, 1, 1)
    alone, images = whole_batch_gradient()
    (alone(images).square() * weights).sum().backward()
    with join_world("cpu", threads=1) as world:
        together = convert_sync_batchnorm(whole_batch_gradient()[0], world.device)
        parallel = nn.parallel.DistributedDataParallel(together)
        (parallel(images.tensor_split(world_size)[rank]).square() * weights).sum().mul(world_size).backward()
    assert list(together.state_dict()) == list(alone.state_dict())
    for (name, ours), theirs in zip(together.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
